"""Training a tabular policy on a tree, exactly: DPO, policy gradients, PPO (Eqs 2, 3 and 9).

A tabular policy has one row of logits a state. All expectations are exact, so what remains of a
method is its mathematics: where it goes and how fast. The ascents are generators of log π, one
policy a step, and the caller stops when she has seen enough.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from qlearn.exact.check import (
    check_beta,
    check_count,
    check_fields,
    check_number,
    check_policy,
    check_problem,
    check_tensors,
)
from qlearn.exact.optimise import minimise
from qlearn.exact.preferences import population_loss
from qlearn.exact.soft import MDP, Beta, evaluate, implicit_rewards, kl_reward, reach
from qlearn.exact.tree import Levels, Tree, present
from qlearn.losses import ppo_clip


def dpo_loss(tree: Tree, logp: Levels, returns: Tensor, log_ref: Levels, beta: Beta) -> Tensor:
    """The population loss of the policy's implicit returns, summed over the prompts: a scalar.

    `returns` (L,) are the judge's, in the order of `tree.leaves()`. A prompt with one response has
    no pair and adds nothing.

    Raises: ValueError for fields or returns that do not fit the tree or are not finite, β that is
    not positive and finite, or where paths merge.
    Source: Eq. 9 with exact expectations; `eq-population-loss` in the book.
    """
    check_beta(beta, tree.shapes)
    check_policy(tree, log_ref, "log_ref", everywhere=True)
    check_fields(tree.shapes, logp=logp)
    prompt = tree.prompt_of()
    check_tensors(returns=returns)
    if returns.shape != prompt.shape:
        raise ValueError(f"returns must have one number a response, {len(prompt)} in all.")
    implied = tree.path_sums(implicit_rewards(logp, log_ref, beta))
    groups = (prompt == p for p in prompt.unique())
    return sum(population_loss(implied[group], returns[group]) for group in groups)


def train_dpo(
    tree: Tree, returns: Tensor, log_ref: Levels, beta: Beta, start: Levels | None = None
) -> Levels:
    """The policy that minimises `dpo_loss`, by L-BFGS from the logits `start` (or the reference).

    It is π*, the optimum of the objective with these returns, whatever the token rewards were.

    Raises: as `dpo_loss`.
    Source: Eq. 9; `eq-population-loss` in the book.
    """
    start = present(tree, log_ref if start is None else start, elsewhere=-torch.inf)
    flat = torch.cat([x.flatten() for x in start])

    def policy(theta):
        return tuple(x.log_softmax(-1) for x in tree.split(theta))

    return policy(
        minimise(lambda theta: dpo_loss(tree, policy(theta), returns, log_ref, beta), flat)
    )


def bandit_gradient(logp: Tensor, returns: Tensor, log_ref: Tensor, beta: float) -> Tensor:
    """∂J/∂θ of a softmax over whole responses: π(y) [ G(y) − E_π G ], G = R − β log π/π_ref.

    Shapes: all (L,), the responses of one prompt; logp = log_softmax(θ). What π never writes has
    gradient 0.

    Raises: ValueError for shapes that differ, or β that is not positive and finite.
    Source: Eq. 2 as a bandit; `eq-bandit-gradient` in the book.
    """
    check_tensors(logp=logp, returns=returns, log_ref=log_ref)
    check_beta(beta)
    p = logp.exp()
    gain = torch.where(p > 0, returns - beta * (logp - log_ref), 0.0)
    return p * (gain - (p * gain).sum())


def policy_gradient(tree: MDP, logp: Levels, reward: Levels, log_ref: Levels, beta: Beta) -> Levels:
    """∂J/∂logits of a tabular token policy: d_π(s) π(a|s) A^π(s,a), an edge field.

    A^π = Q^π − V^π for the reward with the price of distance, r − β log π/π_ref; d_π is `reach`.
    What π never writes has gradient 0.

    Raises: as `soft_backup`, and for `logp` that is no policy on the tree.
    Source: Eq. 2 and the policy gradient theorem; `eq-policy-gradient` in the book.
    """
    check_problem(tree, reward, log_ref, beta)
    return _policy_gradient(tree, logp, reward, log_ref, beta)


def gradient_ascent(
    tree: MDP, reward: Levels, log_ref: Levels, beta: Beta, lr: float, start: Levels | None = None
) -> Iterator[Levels]:
    """Logits ← logits + lr ∂J/∂logits, forever: yields log π of the start and after each step.

    Raises: as `soft_backup`, for a start that is no policy or never writes some action, and where
    a step is too large for float64; all of them at the first policy or later, never before.
    Source: Eq. 2; `eq-policy-gradient` in the book.
    """
    logp = _start(tree, reward, log_ref, beta, lr, start)
    while True:
        yield logp
        gradient = _policy_gradient(tree, logp, reward, log_ref, beta)
        logp = _step(logp, gradient, lr)


def natural_gradient_ascent(
    tree: MDP, reward: Levels, log_ref: Levels, beta: Beta, lr: float, start: Levels | None = None
) -> Iterator[Levels]:
    """Logits ← logits + lr A^π: the natural gradient, which measures a step in nats of policy.

    On one level it contracts exactly: log π/π* shrinks by the factor (1 − lr β) a step. With
    lr = 1/β it is soft policy iteration, and a tree of horizon H is solved in H steps.

    Raises: as `gradient_ascent`.
    Source: Eq. 2; `eq-natural-gradient` in the book.
    """
    logp = _start(tree, reward, log_ref, beta, lr, start)
    while True:
        yield logp
        logp = _step(logp, _advantage(tree, logp, reward, log_ref, beta), lr)


def ppo(
    tree: MDP,
    reward: Levels,
    log_ref: Levels,
    beta: Beta,
    lr: float,
    clip: float = 0.2,
    epochs: int = 4,
    start: Levels | None = None,
) -> Iterator[Levels]:
    """Token PPO with exact expectations: yields log π of the start and after each iteration.

    An iteration fixes the old policy, its state distribution d_old and its advantages A_old for
    the reward r − β log π_old/π_ref (Eq. 3), and takes `epochs` gradient steps on
    E_old[ min(ρ A_old, clip(ρ, 1 ± clip) A_old) ], ρ = π/π_old. What the old policy
    never writes, so what is ABSENT, adds nothing.

    Raises: as `gradient_ascent`, and for clip that is not positive or fewer than one epoch.
    Source: Eqs 2 and 3; `eq-ppo` in the book.
    """
    check_number("clip", clip, above=0, infinite=True)
    check_count("epochs", epochs)
    logp = _start(tree, reward, log_ref, beta, lr, start)
    while True:
        yield logp
        old = logp
        advantage = _advantage(tree, old, reward, log_ref, beta)
        visits = reach(tree, old)
        logits = tuple(x.clone().requires_grad_() for x in old)
        for _ in range(epochs):
            new = tuple(x.log_softmax(-1) for x in logits)
            levels = zip(visits, new, old, advantage, strict=True)
            gain = -sum(_clipped_loss(d, n, o, a, clip) for d, n, o, a in levels)
            slopes = torch.autograd.grad(gain, logits)
            logits = tuple(
                (x + lr * g).detach().requires_grad_() for x, g in zip(logits, slopes, strict=True)
            )
        logp = _policy(x.detach() for x in logits)


def _clipped_loss(visits: Tensor, new: Tensor, old: Tensor, advantage: Tensor, clip: float):
    """E_old of the PPO loss over the edges of one level; `visits` (n_t,), the rest (n_t, A)."""
    never = old == -torch.inf  # the ratio 0/0, which nobody sees, counts as 0
    loss = ppo_clip(new, old.masked_fill(never, 0.0), advantage, clip)
    return (visits[:, None] * old.exp() * loss).sum()


def _policy_gradient(tree: MDP, logp: Levels, reward: Levels, log_ref: Levels, beta: Beta):
    advantage = _advantage(tree, logp, reward, log_ref, beta)
    levels = zip(reach(tree, logp), logp, advantage, strict=True)
    return tuple(d[:, None] * p.exp() * a.masked_fill(p == -torch.inf, 0.0) for d, p, a in levels)


def _advantage(tree: MDP, logp: Levels, reward: Levels, log_ref: Levels, beta: Beta) -> Levels:
    """A^π = Q^π − V^π of the reward with the price of distance."""
    value, q = evaluate(tree, logp, kl_reward(logp, reward, log_ref, beta))
    return tuple(x - v[:, None] for x, v in zip(q, value, strict=True))


def _start(tree: MDP, reward: Levels, log_ref: Levels, beta: Beta, lr: float, start) -> Levels:
    """The policy that an ascent begins with, everything checked."""
    check_problem(tree, reward, log_ref, beta)
    check_number("lr", lr, above=0)
    if start is None:
        return log_ref
    check_policy(tree, start, "start", everywhere=True)
    return start


def _step(logp: Levels, direction: Levels, lr: float) -> Levels:
    return _policy(p + lr * g for p, g in zip(logp, direction, strict=True))


def _policy(logits: Iterable[Tensor]) -> Levels:
    """log π of the logits. Raises ValueError where they have left float64."""
    logp = tuple(x.log_softmax(-1) for x in logits)
    for t, p in enumerate(logp):
        if p.isnan().any():
            raise ValueError(f"The step on level {t} is too large for float64; take a smaller lr.")
    return logp
