"""Search on a tree: guided decoding, likelihood search and beams (Eqs 12 and 13).

Every score here is an edge field: the score of the prefix that ends with this token.
"""

from numbers import Integral

import torch
from torch import Tensor

from qlearn.exact.check import (
    check_beta,
    check_count,
    check_fields,
    check_number,
    check_policy,
    check_problem,
    check_states,
    check_tensors,
)
from qlearn.exact.soft import MDP, Beta, beta_at, soft_backup, soft_value
from qlearn.exact.tree import ABSENT, TERMINAL, Levels, Tree


def guided_scores(
    tree: Tree, reward: Levels, log_ref: Levels, beta: float, value: Levels | None = None
) -> Levels:
    """Σ_{t≤K} [ r + β log π_ref ] + V(s_{K+1}) for every prefix of K+1 tokens, V = V* or `value`.

    Raises: as `soft_backup`, and for `value` without one number a state.
    Source: Eq. 12; `eq-guided` in the book.
    """
    check_beta(beta)
    check_problem(tree, reward, log_ref, beta)
    if value is None:
        value = soft_backup(tree, reward, log_ref, beta).value
    check_states(tree, value=value)
    earned = tree.prefix_sums(tuple(r + beta * x for r, x in zip(reward, log_ref, strict=True)))
    below = (*value[1:], None)
    return tuple(x + tree.next_value(t, below[t]) for t, x in enumerate(earned))


def likelihood_scores(tree: Tree, logp: Levels, beta: float) -> Levels:
    """β Σ_{t≤K} log π(a_t|s_t) for every prefix: guided scores less V*(s₀), if π is π*.

    Raises: ValueError for `logp` that is no policy on the tree, or β that is not positive and
    finite.
    Source: Eq. 13 with its sign mended; `eq-guided-is-likelihood` in the book.
    """
    check_beta(beta)
    check_policy(tree, logp)
    return tuple(beta * x for x in tree.prefix_sums(logp))


def best_prefix(tree: Tree, scores: Levels, depth: int | None = None) -> tuple[int, ...]:
    """The prefix of the first prompt with the highest score: (prompt, token, ...).

    Compares all prefixes of `depth` tokens and all responses that end before; without a depth,
    all complete responses.

    Raises: ValueError for scores that do not fit the tree or are NaN, or a depth below 1.
    """
    check_fields(tree.shapes, scores=scores)
    last = tree.horizon if depth is None else depth
    check_count("depth", last)
    if any((x.isnan() & (c != ABSENT)).any() for x, c in zip(scores, tree.child, strict=True)):
        raise ValueError("scores must be numbers; one of a prefix that can be written is NaN.")
    found = []
    for t, prefixes in enumerate(tree.prefixes()[:last]):
        table = tree.child[t]
        wanted = table == TERMINAL if t + 1 < last else table != ABSENT
        for s, a in wanted.nonzero().tolist():
            if prefixes[s][0] == 0:
                found.append((scores[t][s, a].item(), (*prefixes[s], a)))
    return max(found)[1]


def beam(
    tree: Tree, logp: Levels, width: int, length_penalty: float = 0.0
) -> tuple[tuple[int, ...], float]:
    """Beam search for the likeliest response to the first prompt: (response, its score).

    Of all that continue the prefixes kept so far by one token, keeps the `width` likeliest. Those
    that are finished leave their places empty, so that fewer go on, and compete at the end by
    log π(y) / len(y)^length_penalty. Width 1 is greedy decoding; a width of all prefixes finds the
    response with the highest score. In between a wider beam can find a worse one.

    Raises: ValueError for a width below 1, a length penalty beyond ± 100, or `logp` that is no
    policy on the tree.
    """
    if not (isinstance(width, Integral) and width >= 1):
        raise ValueError(f"A beam keeps at least one prefix, not {width}.")
    check_number("length_penalty", length_penalty, least=-100, most=100)
    check_policy(tree, logp)
    prefixes = tree.prefixes()
    alive, finished = [(0.0, 0)], []
    for t, (table, p) in enumerate(zip(tree.child, logp, strict=True)):
        grown = []
        for so_far, s in alive:
            for a in (table[s] != ABSENT).nonzero()[:, 0].tolist():
                total = so_far + p[s, a].item()
                grown.append((total, (*prefixes[t][s], a), int(table[s, a])))
        grown.sort(key=lambda x: -x[0])
        kept = grown[:width]
        finished += [(x / (t + 1) ** length_penalty, y) for x, y, c in kept if c == TERMINAL]
        alive = [(x, c) for x, _, c in kept if c >= 0]
    score, response = max(finished)
    return response, score


def best_objective(tree: Tree, reward: Levels, log_ref: Levels, beta: Beta) -> Tensor:
    """max_y [ R(y) + β log π_ref(y) ] from each prompt: (n_prompts,), by one backup of maxima.

    What the best deterministic decoder earns on the RLHF objective: J(δ_y) at the mode of π*,
    V*(s₀) + β log max_y π*(y), so less than sampling from π* earns unless π* is certain.

    Raises: as `soft_backup`.
    Source: `eq-one-line` in the book; the mode is one response, and pays log 1/π*(y) nats for it.
    """
    check_problem(tree, reward, log_ref, beta)
    best = None
    for t in reversed(range(tree.horizon)):
        following = tree.next_value(t, best)
        best = (reward[t] + beta_at(beta, t) * log_ref[t] + following).amax(dim=-1)
    return best


def induced_policy(
    tree: MDP, reward: Levels, log_ref: Levels, beta: Beta, value: Levels
) -> tuple[Levels, Levels]:
    """(log π, V̄) that a guess V̂ at the values induces: one soft backup of each state from V̂.

    Q̂ = r + β log π_ref + V̂(s'),  V̄ = β log Σ_a exp(Q̂/β),  log π = (Q̂ − V̄)/β. V̄ = V̂ everywhere
    if and only if V̂ solves the soft Bellman equation.

    Raises: as `soft_backup`, and for `value` without one number a state.
    Source: `eq-value-error` in the book.
    """
    check_problem(tree, reward, log_ref, beta)
    check_states(tree, value=value)
    below = (*value[1:], None)
    logp, backed_up = [], []
    for t in range(tree.horizon):
        b = beta_at(beta, t)
        q = reward[t] + b * log_ref[t] + tree.next_value(t, below[t])
        backed_up.append(soft_value(q, b))
        logp.append((q - backed_up[-1][:, None]) / b)
    return tuple(logp), tuple(backed_up)


def tilt(base_logp: Tensor, tuned_logp: Tensor, untuned_logp: Tensor, alpha: float) -> Tensor:
    """log π ∝ log π_base + α (log π_tuned − log π_untuned), normalised over the last axis.

    Emulated fine-tuning and proxy tuning have another base than the untuned model; DeRa has the
    same. All shapes (..., A), in nats. What the untuned model never writes is not lent, and what
    the base never writes stays unwritten. With α = 0 it is the base.

    Raises: ValueError for shapes that differ, α that is not finite, or where no token is left.
    Source: Eq. 14; `eq-borrowed` in the book.
    """
    check_tensors(base_logp=base_logp, tuned_logp=tuned_logp, untuned_logp=untuned_logp)
    check_number("alpha", alpha)
    if alpha == 0:
        return base_logp.log_softmax(-1)
    lent = (tuned_logp - untuned_logp).masked_fill(untuned_logp == -torch.inf, 0.0)
    mixed = (base_logp + alpha * lent).masked_fill(base_logp == -torch.inf, -torch.inf)
    logp = mixed.log_softmax(-1)
    if logp.isnan().any():
        raise ValueError(
            "The mix is no policy: no token is left that base and tuned model both write, or a "
            "number is NaN or infinite."
        )
    return logp
