"""Exercises of the chapter "Bellman on a tree"."""

import math

import torch
from torch import Tensor

from qlearn.exact import soft
from qlearn.exact.tree import Levels, Tree
from qlearn.solutions import require_function, require_levels


def solution_1(reward, log_ref, value_after, beta):
    """V and log π* of one state."""
    q_tilde = [r + v for r, v in zip(reward, value_after, strict=True)]
    weights = [math.exp(p + q / beta) for p, q in zip(log_ref, q_tilde, strict=True)]
    value = beta * math.log(sum(weights))
    return value, [p + (q - value) / beta for p, q in zip(log_ref, q_tilde, strict=True)]


def check_1(answer) -> None:
    require_function(answer)
    generator = torch.Generator().manual_seed(31)
    for beta in (0.3, 1.0):
        reward, logits, after = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        log_ref = logits.log_softmax(0)
        after[0] = 0.0
        got = answer(reward.tolist(), log_ref.tolist(), after.tolist(), beta)
        assert isinstance(got, tuple | list) and len(got) == 2, "Return a pair: V, list of log π*."
        tilt = log_ref + (reward + after) / beta
        value, logp = got
        assert abs(float(value) - (beta * tilt.logsumexp(0)).item()) < 1e-9, (
            "V is β log Σ π_ref exp(Q̃/β), with Q̃ = reward + value after."
        )
        found = torch.as_tensor(logp, dtype=torch.float64)
        assert found.shape == (4,), "One log-probability a token."
        assert abs(found.exp().sum() - 1) < 1e-9, "The probabilities must sum to 1."
        assert (found - tilt.log_softmax(0)).abs().max() < 1e-9, (
            "log π* = log π_ref + (Q̃ − V)/β: is the reference in it?"
        )


def bug_2(tree: Tree, q: Levels, log_ref: Levels, beta: float) -> Levels:
    """The reward for which `q` is optimal."""
    value = [soft.soft_value(x, beta) for x in q]
    reward = []
    for t in range(tree.horizon):
        v = value[t][:, None] if t + 1 < tree.horizon else 0.0
        reward.append(q[t] - beta * log_ref[t] - v)
    return tuple(reward)


def solution_2(tree: Tree, q: Levels, log_ref: Levels, beta: float) -> Levels:
    """The reward for which `q` is optimal."""
    value = [*(soft.soft_value(x, beta) for x in q), None]
    reward = []
    for t in range(tree.horizon):
        v = tree.next_value(t, value[t + 1])  # of the state after the token, 0 at the end
        reward.append(q[t] - beta * log_ref[t] - v)
    return tuple(reward)


def check_2(answer) -> None:
    require_function(answer)
    for seed in range(3):
        tree, q, log_ref, beta = _problem(seed)
        got = require_levels(answer(tree, q, log_ref, beta), tree)

        def after(value, tree=tree, q=q):  # of the state after each token
            values = [*(value(t) for t in range(tree.horizon)), None]
            return [tree.next_value(t, values[t + 1]) for t in range(tree.horizon)]

        price = [beta * ref for ref in log_ref]
        v = after(lambda t, q=q, beta=beta: soft.soft_value(q[t], beta))
        hard = after(lambda t, q=q: q[t].max(dim=-1).values)
        twice = after(
            lambda t, q=q, ref=log_ref, beta=beta: soft.soft_value_prior(q[t], ref[t], beta)
        )
        nothing = [0.0 * x for x in q]
        typical = [
            (nothing, v, "Where is the reference? `q` has it inside."),
            (price, hard, "V_Q is the soft maximum."),
            (price, twice, "`q` already holds the reference: do not count it twice."),
        ]
        for ref, ahead, hint in typical:
            wrong = [x - p - y for x, p, y in zip(q, ref, ahead, strict=True)]
            off = max((x - y).abs().max().item() for x, y in zip(got, wrong, strict=True))
            assert off > 1e-9, hint
        again = soft.soft_backup(tree, got, log_ref, beta).q
        for t in range(tree.horizon):
            assert (again[t] - q[t]).abs().max() < 1e-9, (
                f"For your reward other Q-values are optimal, at level {t}. Which state's value "
                "follows a token: the one where it is written, or the one after it?"
            )


def solution_3(q_tilde: Levels, log_ref: Levels, log_new: Levels, beta: float) -> Levels:
    """Q̃ + β log π_ref − β log π_new."""
    levels = zip(q_tilde, log_ref, log_new, strict=True)
    return tuple(q + beta * (old - new) for q, old, new in levels)


def check_3(answer) -> None:
    require_function(answer)
    for seed in range(3):
        tree, reward, log_ref, beta = _problem(10 + seed)
        log_new = _problem(40 + seed)[2]
        best = soft.soft_backup_prior(tree, reward, log_ref, beta)
        got = require_levels(answer(best.q_tilde, log_ref, log_new, beta), tree)
        for q, new, value, logp in zip(got, log_new, best.value, best.logp, strict=True):
            v = soft.soft_value_prior(q, new, beta)
            assert (v - value).abs().max() < 1e-9, "The values changed: sign, or a missing β?"
            found = new + (q - v[:, None]) / beta
            assert (found - logp).abs().max() < 1e-9, "Another policy is optimal."


def solution_4(tree: Tree, reward: Levels, log_ref: Levels, beta: float) -> float:
    """The slope of V at the prompt in a bonus paid for every token."""

    def value(bonus):
        paid = tuple(r + bonus for r in reward)
        return soft.soft_backup(tree, paid, log_ref, beta).value[0][0].item()

    h = 1e-4 * beta
    return (value(h) - value(-h)) / (2 * h)


def check_4(answer) -> None:
    require_function(answer)
    for seed in range(3):
        tree, reward, log_ref, beta = _problem(20 + seed)
        logp = soft.soft_backup(tree, reward, log_ref, beta).logp
        lengths = torch.tensor([len(y) - 1.0 for y in tree.leaves()], dtype=torch.float64)
        truth = (tree.path_sums(logp).exp() * lengths).sum().item()
        got = answer(tree, reward, log_ref, beta)
        assert isinstance(got, int | float) or (isinstance(got, Tensor) and got.ndim == 0), (
            "Return one number."
        )
        got = float(got)
        assert not 1e-3 <= abs(got - truth) < 1e-2, (
            "Close: take a smaller bonus, or one on either side."
        )
        assert abs(got - truth) < 1e-3, (
            f"The mean length is {truth:.4f}, not {got:.4f}. How does V answer to a bonus a token?"
        )


def _problem(seed: int) -> tuple[Tree, Levels, Levels, float]:
    """A random reward and reference on a tree of two words and end, three tokens deep."""
    tree = Tree.full(n_actions=3, horizon=3, eos=0)
    generator = torch.Generator().manual_seed(300 + seed)
    reward, logits = (
        tree.split(torch.randn(21, generator=generator, dtype=torch.float64)) for _ in range(2)
    )
    return tree, reward, tuple(x.log_softmax(-1) for x in logits), (0.3, 0.7, 1.0)[seed % 3]
