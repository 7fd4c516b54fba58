"""Exercises of the chapter "Shaping and Theorem 1"."""

import math

import torch
from torch import Tensor

from qlearn.exact import likelihood, shaping, soft
from qlearn.exact.tree import TERMINAL, Levels, Tree
from qlearn.solutions import require_function, require_levels


def solution_1(tree: Tree, reward: Levels) -> Levels:
    """Φ(s) = −(what has been earned on the way to s)."""
    earned, potential = torch.zeros(len(tree.child[0]), dtype=torch.float64), []
    for table, sums in zip(tree.child, tree.prefix_sums(reward), strict=True):
        potential.append(-earned)
        goes_on = table >= 0
        earned = torch.empty(int(goes_on.sum()), dtype=torch.float64)
        earned[table[goes_on]] = sums[goes_on]
    return tuple(potential)


def check_1(answer) -> None:
    require_function(answer)
    for seed in range(3):
        tree, reward, _, _ = _problem(seed)
        got = answer(tree, reward)
        assert isinstance(got, tuple | list), "Return one tensor a level, in a tuple."
        shapes = [(n,) for n, _ in tree.shapes]
        assert [tuple(x.shape) for x in got] == shapes, (
            "One number for each state; `prefix_sums` has one for each edge."
        )
        paid = shaping.shape_reward(tree, reward, tuple(got))
        negative = shaping.shape_reward(tree, reward, tuple(-x for x in got))
        assert not _only_at_end(tree, negative), (
            "The sign: Φ(s') is added where a token is written. It must take away what was earned."
        )
        assert _only_at_end(tree, paid), (
            "After shaping, some token that does not end its answer is still paid."
        )
        moved = tree.path_sums(paid) - tree.path_sums(reward)
        assert moved.abs().max() < 1e-9, "The returns moved: Φ must be 0 at the prompt."


def bug_2(tree: Tree, reward: Levels, other: Levels) -> bool:
    """Whether the two rewards are equivalent."""
    change = tuple(b - a for a, b in zip(reward, other, strict=True))
    after = tree.prefix_sums(change)  # Φ(s'), from Φ(prompt) = 0 along the branches
    before = tuple(x - c for x, c in zip(after, change, strict=True))  # Φ(s)
    levels = zip(reward, after, before, other, strict=True)
    return all(torch.allclose(r + x - y, new) for r, x, y, new in levels)


def solution_2(tree: Tree, reward: Levels, other: Levels) -> bool:
    """Whether the two rewards are equivalent."""
    change = tuple(b - a for a, b in zip(reward, other, strict=True))
    ends = tree.path_sums(change)  # Φ on finished answers, from Φ(prompt) = 0
    prompt = tree.prompt_of()
    spread = [ends[prompt == p].max() - ends[prompt == p].min() for p in prompt.unique()]
    return all(x.item() < 1e-8 for x in spread)


def check_2(answer) -> None:
    require_function(answer)
    for seed in range(3):
        for n_prompts in (1, 2):
            tree, reward, log_ref, beta = _problem(seed, n_prompts)
            generator = torch.Generator().manual_seed(70 + seed)
            potential = tuple(
                torch.randn(n, generator=generator, dtype=torch.float64) for n, _ in tree.shapes
            )
            shaped = shaping.shape_reward(tree, reward, potential)
            nudged = (*shaped[:-1], shaped[-1].clone())
            nudged[-1][-1, 0] += 0.01
            paid = tuple(x + 0.1 for x in reward)
            for other, truth, hint in (
                (shaped, True, "shaped by a random Φ that is 0 at the ends"),
                (_problem(seed + 50, n_prompts)[1], False, "rolled independently"),
                (nudged, False, "shaped, then one last token paid 0.01 more"),
                (paid, False, "0.1 more for every token"),
                (
                    shaping.canonical_reward(tree, reward, log_ref, beta),
                    True,
                    "the representative of the class",
                ),
            ):
                got = answer(tree, reward, other)
                assert isinstance(got, bool | Tensor), "Return True or False."
                prompts = "one prompt" if n_prompts == 1 else "two prompts, each with its own Φ(x)"
                why = (
                    "If you start from Φ = 0 at the prompt, the ends need not be 0, but below one "
                    "prompt they must agree."
                    if truth
                    else "A judge can tell: where does the potential have to be one number?"
                )
                assert bool(got) == truth, (
                    f"You say {bool(got)}. The other reward: {hint} ({prompts}). {why}"
                )


def solution_3(tree: Tree, scores: Tensor, log_ref: Levels, beta: float) -> Levels:
    """The representative of the class of all token rewards with these returns."""
    return shaping.canonical_reward(tree, tree.only_at_end(scores), log_ref, beta)


def check_3(answer) -> None:
    require_function(answer)
    for seed in range(3):
        tree, reward, log_ref, beta = _problem(10 + seed)
        scores = tree.path_sums(reward) + 3.0  # a judge's zero is anywhere
        best = soft.soft_backup_prior(tree, reward, log_ref, beta)
        got = require_levels(answer(tree, scores, log_ref, beta), tree)
        assert not _only_at_end(tree, got), (
            "That pays everything at the end. It is in the class, but DPO prints another member."
        )
        triples = list(zip(got, best.logp, log_ref, strict=True))
        assert any((x + beta * (p - ref)).abs().max() > 1e-9 for x, p, ref in triples), (
            "The sign: the value after a token is added, the value before it is subtracted."
        )
        assert any((x - beta * p).abs().max() > 1e-9 for x, p, _ in triples), (
            "That is β log π*, the advantage with the reference inside; take the reference out."
        )
        assert beta == 1 or any((x - (p - ref)).abs().max() > 1e-9 for x, p, ref in triples), (
            "That is log π*/π_ref: a β is missing in front."
        )
        assert any((x - p).abs().max() > 1e-9 for x, p, _ in triples), "That is log π*."
        paid = tree.path_sums(got) - scores
        assert paid.max() - paid.min() < 1e-9, "A judge could tell: some return moved alone."
        for x, p, ref in triples:
            mass = (ref + x / beta).logsumexp(-1)
            assert mass.abs().max() < 1e-9, "At some fork the mean of exp(r̂/β) is not 1."
            assert (x - beta * (p - ref)).abs().max() < 1e-9, "It should be β log π*/π_ref."


def solution_4(returns: Tensor, log_ref: Tensor) -> float:
    """The root of E_w r̂ in β, by bisection of log β."""
    low, high = 1e-6, 1e6
    for _ in range(100):
        middle = math.sqrt(low * high)
        if likelihood.sign_law(returns, log_ref, middle).chosen < 0:
            low = middle
        else:
            high = middle
    return middle


def check_4(answer) -> None:
    require_function(answer)
    for returns, weights in (
        ([0.0, 2.0], [0.1, 0.9]),
        ([0.0, 2.0], [0.5, 0.5]),
        ([-1.0, 0.5, 3.0], [0.6, 0.3, 0.1]),
    ):
        R = torch.tensor(returns, dtype=torch.float64)
        log_ref = torch.tensor(weights, dtype=torch.float64).log()
        got = answer(R, log_ref)
        assert isinstance(got, int | float) and got > 0, "Return β, a positive float."
        p = log_ref.exp()
        wins = torch.sigmoid(R[:, None] - R[None, :])
        chosen = (2 * p * (wins @ p) * R).sum()  # the law of the winners, summed
        value = got * (log_ref + R / got).logsumexp(0)
        assert abs(value - chosen) < 1e-6, (
            f"For returns {returns} with probabilities {weights} the winners earn "
            f"{chosen.item():.6f} on average, and at β = {got:.6g} the value is "
            f"{value.item():.6f}. The two should agree."
        )


def _only_at_end(tree: Tree, field: Levels) -> bool:
    levels = zip(tree.child, field, strict=True)
    return all(x[table != TERMINAL].abs().sum() < 1e-9 for table, x in levels)


def _problem(seed: int, n_prompts: int = 1) -> tuple[Tree, Levels, Levels, float]:
    """A random reward and reference on a tree of two words and end, three tokens deep."""
    tree = Tree.full(n_actions=3, horizon=3, eos=0, n_prompts=n_prompts)
    generator = torch.Generator().manual_seed(seed)
    n = sum(table.numel() for table in tree.child)
    reward = tree.split(torch.randn(n, generator=generator, dtype=torch.float64))
    logits = tree.split(torch.randn(n, generator=generator, dtype=torch.float64))
    return tree, reward, tuple(x.log_softmax(-1) for x in logits), (0.3, 0.7, 1.0)[seed % 3]
