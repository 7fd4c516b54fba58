"""Exercises of the chapter "What preferences can see"."""

import itertools
import math

import torch
from torch import Tensor

from qlearn.exact import shaping
from qlearn.exact.tree import Levels, Tree
from qlearn.solutions import require_function


def solution_1(returns: list[float]) -> float:
    """The Plackett-Luce probability of this order, the best answer first."""
    p = 1.0
    for k in range(len(returns)):
        left, top = returns[k:], max(returns[k:])
        p *= math.exp(left[0] - top) / sum(math.exp(r - top) for r in left)
    return p


def check_1(answer) -> None:
    require_function(answer)
    for returns in (
        [0.3, -1.0],
        [2.0],
        [0.5, 1.5, -0.7],
        [1.0, 0.0, -1.0, 0.5],
        [1001.0, 1000.0],
        [-1001.0, -1000.0],
        [1000.0, 1.0, 0.0],
        [0.0, 1000.0],
    ):
        try:
            got = answer(returns)
        except (OverflowError, ZeroDivisionError):
            raise AssertionError(
                f"exp is too large or too small for the returns {returns}: only differences "
                "matter, so take the largest out first."
            ) from None
        assert isinstance(got, int | float | Tensor), "Return one number."
        got, n = float(got), len(returns)
        assert not math.isnan(got), f"Not a number at the returns {returns}: take one of them out."
        left = [_log_sum_exp(returns[k:]) - r for k, r in enumerate(returns)]
        truth = math.exp(-sum(left))
        if abs(got - truth) < 1e-9:
            continue
        if n > 1:
            assert abs(got + sum(left)) > 1e-9, "That is the logarithm of the probability."
            everyone = math.exp(sum(r - _log_sum_exp(returns) for r in returns))
            assert abs(got - everyone) > 1e-9, "Who has been placed takes no part in later choices."
        if n > 2:
            pairs = itertools.combinations(returns, 2)
            votes = math.exp(sum(high - _log_sum_exp([high, low]) for high, low in pairs))
            assert abs(got - votes) > 1e-9, (
                "You multiplied Bradley-Terry over all pairs. The pairs of a ranking are not "
                "independent: multiply choices, each from all that are left."
            )
            backwards = math.exp(
                sum(r - _log_sum_exp(returns[: k + 1]) for k, r in enumerate(returns))
            )
            assert abs(got - backwards) > 1e-9, "The first of the list is the best, not the last."
        raise AssertionError(
            f"The order {returns} has probability {truth:.6g}: the best is chosen from all "
            f"{n}, the next from all that are left, and so on."
        )


def _log_sum_exp(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).logsumexp(0).item()


def bug_2(wins: Tensor) -> bool:
    """Whether one vector of mean 0 is most likely; i beat j `wins[i, j]` times."""
    won, lost = wins.sum(dim=1), wins.sum(dim=0)
    return bool((won > 0).all() and (lost > 0).all())


def solution_2(wins: Tensor) -> bool:
    """Whether one vector of mean 0 is most likely; i beat j `wins[i, j]` times."""
    n = len(wins)
    chain = (wins > 0).double() + torch.eye(n)
    for _ in range(n):  # chains of victories of every length
        chain = ((chain @ chain) > 0).double()
    return bool((chain > 0).all())


def check_2(answer) -> None:
    require_function(answer)
    two_rings = torch.zeros(6, 6, dtype=torch.float64)
    for i, j in ((0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3)):
        two_rings[i, j] = 1.0
    upper = two_rings.clone()
    upper[0, 3] = 4.0
    joined = upper.clone()
    joined[5, 2] = 1.0
    unbeaten = torch.tensor([[0.0, 5.0, 5.0], [0.0, 0.0, 2.0], [0.0, 1.0, 0.0]]).double()
    everyone = torch.ones(4, 4, dtype=torch.float64).fill_diagonal_(0)
    for wins in (everyone, unbeaten, joined, upper, two_rings):
        got = answer(wins)
        assert isinstance(got, bool), "Return True or False."
        group = _never_beaten(wins)
        assert got or group is not None, (
            "You found no maximum, but every group has lost to the rest at least once. Victories "
            "count in chains: i over j over k."
        )
        assert not got or group is None, (
            f"Nobody else has ever beaten one of the answers {group}. Raise all their returns by "
            "the same amount: does the likelihood ever fall?"
        )


def _never_beaten(wins: Tensor) -> list[int] | None:
    """A group of answers that never lost to the rest, by trying all of them."""
    n = len(wins)
    for size in range(1, n):
        for group in itertools.combinations(range(n), size):
            rest = [i for i in range(n) if i not in group]
            if not wins[rest][:, list(group)].any():
                return list(group)
    return None


def solution_3(gap: float, target: float) -> float:
    """Votes until the fitted gap has the standard error `target`."""
    p = 1 / (1 + math.exp(-gap))
    return 1 / (target**2 * p * (1 - p))


def check_3(answer) -> None:
    require_function(answer)
    for gap, target in ((2.0, 0.1), (0.0, 0.1), (-4.0, 0.02)):
        got = answer(gap, target)
        assert isinstance(got, int | float), "Return one number."
        p = 1 / (1 + math.exp(-gap))
        truth = 1 / (target**2 * p * (1 - p))

        def is_near(other, got=got):
            return abs(got - other) < 1e-3 * abs(other) + 1

        if not is_near(truth):
            assert not is_near(p * (1 - p) / target**2), (
                "So the *share* of votes gets the error `target`. The gap is its log-odds, whose "
                "slope in the share is 1/(p(1 - p))."
            )
            assert not is_near(1 / (4 * p * (1 - p) * target**2)), (
                "That is the variance of one return; the gap's is 1/(N p(1 - p))."
            )
            assert not is_near(1 / (target * p * (1 - p))), "A standard error falls as 1/√n."
            assert not is_near(1 / target**2), (
                "A vote is worth p(1 - p) units of information, not one: a sure win tells little."
            )
        assert is_near(truth), (
            f"At a gap of {gap:g} one vote is worth p(1 - p) = {p * (1 - p):.3g}, so an error of "
            f"{target:g} takes {truth:.0f} votes, not {got:.6g}."
        )


def solution_4(tree: Tree, question: Levels) -> bool:
    """Whether the votes determine Σ question · reward: is the question a flow?"""
    arriving = torch.zeros(len(tree.child[0]), dtype=torch.float64)  # at the prompts
    for t, c in enumerate(question):
        if (c.sum(dim=1) - arriving).abs().max() > 1e-9:
            return False
        arriving = tree.push(t, c)  # at each state of the next level
    return True


def check_4(answer) -> None:
    require_function(answer)
    one, two = (Tree.full(n_actions=3, horizon=3, eos=0, n_prompts=n) for n in (1, 2))
    generator = torch.Generator().manual_seed(44)
    rows = shaping.paths(two)
    leaves = two.leaves()
    here, there = (next(i for i, y in enumerate(leaves) if y[0] == p) for p in (0, 1))
    single = torch.zeros(one.n_edges, dtype=torch.float64)
    single[2] = 1.0
    goes_on, both_end = torch.zeros(2, one.n_edges, dtype=torch.float64)
    goes_on[1], goes_on[2] = 1.0, -1.0  # entry-level or manager, as a first word
    both_end[-1], both_end[-2] = 1.0, -1.0
    seen = shaping.difference_matrix(two)
    mixed = torch.randn(len(seen), generator=generator, dtype=torch.float64) @ seen
    leak = mixed.clone()
    leak[0] += 0.1
    hidden = torch.randn(two.n_states, generator=generator, dtype=torch.float64)
    for name, tree, question, truth in (
        ("the reward of one token", one, single, False),
        ("the reward of one first word less that of another", one, goes_on, False),
        ("one last token less another in the same state", one, both_end, True),
        ("a return, not compared with anything", one, shaping.paths(one)[4], False),
        ("a difference of two returns", two, rows[here + 3] - rows[here], True),
        ("a difference of returns of two prompts", two, rows[here] - rows[there], False),
        ("a mixture of differences within each prompt", two, mixed, True),
        ("the same mixture with a small leak", two, leak, False),
        ("a question with no flow at all", two, hidden @ shaping.invisible_rewards(two), False),
        ("a question of zeros", one, torch.zeros_like(single), True),
    ):
        got = answer(tree, tree.split(question))
        assert isinstance(got, bool), "Return True or False."
        assert got == truth, (
            f"{name.capitalize()}: the votes {'do' if truth else 'do not'} determine it. What "
            "enters a state must leave it, and out of each prompt flows 0."
        )
