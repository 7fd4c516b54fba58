"""The errata page: for every slip, the printed form fails and the corrected form holds.

The number in a test's name is the slip's number on the page (book/errata.md).
"""

import math
import re
from pathlib import Path

import pytest
import torch

from qlearn.exact import search, shaping, soft
from qlearn.exact.tree import ABSENT, Tree

from .exact import oracle
from .exact.worlds import (
    EOS,
    as_dict,
    by_oracle,
    furthest,
    random_field,
    random_policy,
    small_problem,
)

PAGE = (Path(__file__).resolve().parents[1] / "book" / "errata.md").read_text(encoding="utf-8")
COMPLETE = oracle.responses(3, 3, EOS)
BETA = 0.5


@pytest.fixture
def solved():
    """A random problem with its optimum by enumeration, as dictionaries of prefixes."""
    tree, reward, log_ref = small_problem(7)
    r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
    value = oracle.values(COMPLETE, r, ref, BETA)
    logp = {(s, a): ref[s, a] + (r[s, a] + value.get((*s, a), 0.0) - value[s]) / BETA for s, a in r}
    return r, ref, value, logp


def test_claim_erratum_01_the_first_state_is_the_prompt(solved):
    """A sum that starts at a state with tokens in it leaves V of that state, not V(x)."""
    r, ref, value, logp = solved
    for y in COMPLETE:
        if len(y) > 2:
            late = BETA * (oracle.total(logp, y, 2) - oracle.total(ref, y, 2))
            assert abs(late - (oracle.total(r, y, 2) - value[y[:2]])) < 1e-10
            assert abs(late - (oracle.total(r, y, 2) - value[0,])) > 1e-3


def test_claim_erratum_02_a_trajectory_counts_from_its_first_token(solved):
    """Eq. 1 sums i = 1 … N; on tokens 0 … N−1 that would leave out the first reward."""
    r, *_ = solved
    w, lost = COMPLETE[5], COMPLETE[9]
    whole, late = (oracle.total(r, w, n) - oracle.total(r, lost, n) for n in (1, 2))
    assert abs(oracle.sigmoid(whole) - oracle.sigmoid(late)) > 1e-2


def test_claim_erratum_03_the_entropy_belongs_inside_the_sum():
    """KL is the reference's term and the entropy, of every token."""
    tree, _, log_ref = small_problem(3)
    policy = random_policy(tree, 8)
    p, ref = as_dict(tree, policy), as_dict(tree, log_ref)
    reach = {s: math.exp(oracle.total(p, s)) for s, _ in p}
    entropy = {s: -sum(math.exp(p[s, a]) * p[s, a] for a in range(3)) for s in reach}
    cross = -sum(reach[s] * math.exp(p[s, a]) * ref[s, a] for s, a in p)
    kl = soft.sequence_kl(tree, policy, log_ref).item()
    assert abs(kl - (cross - sum(reach[s] * entropy[s] for s in reach))) < 1e-10
    assert abs(kl - (cross - entropy[0,])) > 1e-2  # once, outside the sum
    assert abs(kl - cross) > 1e-2  # the brace "KL penalty" alone


def test_claim_erratum_04_the_closed_form_needs_one_over_beta(solved):
    """π* ∝ π_ref exp(R/β), and R = β log π*/π_ref + β log Z; the printed forms miss both."""
    r, ref, value, logp = solved
    returns = [oracle.total(r, y) for y in COMPLETE]
    prior = [oracle.total(ref, y) for y in COMPLETE]
    best = [oracle.total(logp, y) for y in COMPLETE]
    right, printed = (oracle.gibbs(returns, prior, b) for b in (BETA, 1.0))
    assert all(abs(x - y) < 1e-10 for x, y in zip(best, right, strict=True))
    assert max(abs(x - y) for x, y in zip(best, printed, strict=True)) > 0.1
    z = math.fsum(math.exp(q + g / BETA) for q, g in zip(prior, returns, strict=True))
    for g, q, p in zip(returns, prior, best, strict=True):
        assert abs(g - (BETA * (p - q) + BETA * math.log(z))) < 1e-10
        assert abs(g - (BETA * (p - q) - z)) > 0.1
    assert abs(value[0,] - BETA * math.log(z)) < 1e-10


def test_claim_erratum_05_the_return_is_a_sum_of_advantages_with_plus(solved):
    """Σ r = V*(s₀) + Σ (Q* − V* − β log π_ref); with a minus it is off by twice the sum."""
    r, ref, value, logp = solved
    for y in COMPLETE:
        terms = sum(BETA * logp[e] - BETA * ref[e] for e in oracle.steps(y))
        assert abs(oracle.total(r, y) - (value[0,] + terms)) < 1e-10
        printed = value[0,] - terms
        assert abs(oracle.total(r, y) - printed - 2 * terms) < 1e-10
    assert abs(terms) > 1e-2


def test_claim_erratum_06_the_loss_is_a_function_of_the_trained_policy(solved):
    """Eq. 9 with π* printed for π_θ would be a constant: nothing to train."""
    _, ref, _, logp = solved
    w, lost = COMPLETE[2], COMPLETE[11]

    def loss(p):
        margin = BETA * sum(
            sign * (oracle.total(p, y) - oracle.total(ref, y)) for sign, y in ((1, w), (-1, lost))
        )
        return -math.log(oracle.sigmoid(margin))

    tree, _, _ = small_problem(7)
    losses = {loss(as_dict(tree, random_policy(tree, seed))) for seed in range(5)}
    assert len(losses) == 5 and min(abs(x - loss(logp)) for x in losses) > 1e-4


def test_claim_erratum_07_equivalence_needs_potentials_that_end_at_zero():
    """Without Φ(end) = 0 any two rewards are 'equivalent', and preferences differ."""
    tree, reward, _ = small_problem(1)
    other = random_field(tree, 99)
    so_far = tree.prefix_sums(tuple(y - x for x, y in zip(reward, other, strict=True)))
    potential = [torch.zeros(1, dtype=torch.float64)]
    for t in range(1, tree.horizon):
        potential.append(so_far[t - 1][tree.child[t - 1] >= 0])
    shaped = shaping.shape_reward(tree, reward, tuple(potential), so_far, keep_preferences=False)
    assert furthest(shaped, other) < 1e-12
    gap = tree.path_sums(other) - tree.path_sums(reward)
    assert gap.max() - gap.min() > 0.1
    with pytest.raises(ValueError, match="not equivalent"):
        shaping.find_potential(tree, reward, other)


def test_claim_erratum_08_a_policy_is_normalised_over_actions(solved):
    """§5.1 prints π_θ(s|a). exp((Q − V)/β) sums to 1 over actions; over states it does not."""
    _, _, _, logp = solved
    states = {s for s, _ in logp}
    assert all(abs(sum(math.exp(logp[s, a]) for a in range(3)) - 1) < 1e-10 for s in states)
    assert all(abs(sum(math.exp(logp[s, a]) for s in states) - 1) > 1e-2 for a in range(3))


def test_claim_erratum_09_guided_decoding_conditions_on_the_state(solved):
    """Eq. 12 prints π_ref(s, a). With a joint probability the score is no likelihood search."""
    r, ref, value, logp = solved
    worst = 0.0
    for y in COMPLETE:
        likely = value[0,] + BETA * oracle.total(logp, y)
        assert abs(oracle.total(r, y) + BETA * oracle.total(ref, y) - likely) < 1e-10
        joint = sum(oracle.total(ref, s) + ref[s, a] for s, a in oracle.steps(y))
        worst = max(worst, abs(oracle.total(r, y) + BETA * joint - likely))
    assert worst > 0.1


def test_claim_erratum_10_likelihood_search_adds_the_value_of_the_prompt():
    """Eq. 13 prints −V*(s₀); the score is +V*(s₀) + β Σ log π*, for every prefix."""
    tree, reward, log_ref = small_problem(2)
    guided = as_dict(tree, search.guided_scores(tree, reward, log_ref, BETA))
    values, _, logp = by_oracle(tree, reward, log_ref, BETA)
    value, likely = values[0].item(), as_dict(tree, logp)
    for (s, a), g in guided.items():
        log_pi = oracle.total(likely, (*s, a))
        assert abs(g - (value + BETA * log_pi)) < 1e-10
        assert abs(abs(g - (-value + BETA * log_pi)) - 2 * abs(value)) < 1e-10
    assert abs(value) > 0.1


def test_claim_erratum_11_proxy_tuning_has_two_temperatures_and_the_other_advantage():
    """Eq. 15: the factor is exp((α/β₀)(Q̃* − V*)); neither exp(β(Q* − V*)) nor one β for both.

    `eq-borrowed-advantage` against `eq-borrowed`, term by term.
    """
    tree, reward, log_ref = small_problem(4)
    base, beta0, alpha = random_policy(tree, 5), 0.5, 1.5
    inside = soft.soft_backup(tree, reward, log_ref, beta0)
    prior = soft.soft_backup_prior(tree, reward, log_ref, beta0)
    for t in range(tree.horizon):
        mixed = search.tilt(base[t], inside.logp[t], log_ref[t], alpha)
        v = inside.value[t][:, None]
        right = base[t] + alpha / beta0 * (prior.q_tilde[t] - v)
        assert (mixed - right.log_softmax(-1)).abs().max() < 1e-10
        for factor, q in (
            (alpha, inside.q[t]),
            (alpha / beta0, inside.q[t]),
            (alpha, prior.q_tilde[t]),
        ):
            wrong = (base[t] + factor * (q - v)).log_softmax(-1)
            assert (mixed - wrong).abs().max() > 1e-2


def test_claim_erratum_12_the_bijection_is_about_the_optimal_q():
    """Appendix A says 'for a fixed policy': Q^π of another policy is not Q*.

    r + E[what follows] by enumeration: that of π* is Q̃*, that of a fixed policy lies below it, and
    the inverse of Eq. 7 gives the reward back from Q* and not from Q^π.
    """
    tree, reward, log_ref = small_problem(5)
    _, best, star = by_oracle(tree, reward, log_ref, BETA)
    by_backup = soft.soft_backup_prior(tree, reward, log_ref, BETA).q_tilde
    assert furthest(by_backup, best) < 1e-10
    paths = {}
    for name, policy in (("best", star), ("fixed", random_policy(tree, 6))):
        p, ref, r = (as_dict(tree, x) for x in (policy, log_ref, reward))
        paid = soft.kl_reward(policy, reward, log_ref, BETA)
        _, evaluated = soft.evaluate(tree, policy, paid)
        q = {}
        for s, a in r:
            ahead, n = [y for y in COMPLETE if y[: len(s) + 1] == (*s, a)], len(s) + 1
            later = math.fsum(
                math.exp(oracle.total(p, y, n)) * sum(r[e] - BETA * (p[e] - ref[e])
                for e in oracle.steps(y, n)) for y in ahead
            )  # fmt: skip
            q[s, a] = r[s, a] + later
            price = BETA * (p[s, a] - ref[s, a])
            level, row = len(s) - 1, tree.prefixes()[len(s) - 1].index(s)
            assert abs(evaluated[level][row, a].item() - (q[s, a] - price)) < 1e-10
        paths[name] = q
    exact = as_dict(tree, best)
    assert all(abs(paths["best"][e] - x) < 1e-10 for e, x in exact.items())
    assert all(paths["fixed"][e] < x + 1e-12 for e, x in exact.items())
    assert max(x - paths["fixed"][e] for e, x in exact.items()) > 0.1
    for name, recovers in (("best", True), ("fixed", False)):
        q = tree.split(torch.tensor(list(paths[name].values()), dtype=torch.float64))
        inside = tuple(x + BETA * ref for x, ref in zip(q, log_ref, strict=True))
        back = soft.reward_from_q(tree, inside, log_ref, BETA)
        assert (furthest(back, reward) < 1e-10) == recovers


def test_claim_erratum_13_denoising_goes_on_to_the_next_image():
    """App. B prints a_t = x_{T−t+1}, the image before; f must lead to x_{T−t−1}.

    Each image has another number of values, so a level's table shows which image its actions pick:
    against the chain written out as a graph of states (x_{T−t}, T − t).
    """
    steps = 4
    n_values = {4: 2, 3: 5, 2: 3, 1: 6, 0: 4}  # of x_T … x_0
    tree = Tree.layered([n_values[steps - t - 1] for t in range(steps)], n_values[steps])
    graph = {
        (value, t): [(after, t - 1) if t > 1 else None for after in range(n_values[t - 1])]
        for t in range(1, steps + 1) for value in range(n_values[t])
    }  # fmt: skip
    by_hand, states = Tree.from_graph(graph, [(value, steps) for value in range(n_values[steps])])
    for t, (table, expected) in enumerate(zip(tree.child, by_hand.child, strict=True)):
        n_states, n_actions = table.shape
        assert (n_states, n_actions) == (n_values[steps - t], n_values[steps - t - 1])
        assert torch.equal(table, expected[:, :n_actions])
        assert (expected[:, n_actions:] == ABSENT).all()
        assert states[t] == [(value, steps - t) for value in range(n_states)]
        if t:
            assert n_actions != n_values[steps - t + 1]  # the printed a_t would be one of these


def test_page_and_tests_have_the_same_numbers():
    """Every slip on the page has its test, but the last, which is a matter of record."""
    on_page = [int(n) for n in re.findall(r"^## (\d+)\. ", PAGE, re.M)]
    source = Path(__file__).read_text(encoding="utf-8")
    tested = [int(n) for n in re.findall(r"^def test_claim_erratum_(\d+)_", source, re.M)]
    assert on_page == [*tested, len(tested) + 1]
    named = re.findall(r"`(test_claim_erratum_\w+)`", PAGE)
    assert named == re.findall(r"^def (test_claim_erratum_\w+)\(", source, re.M)
