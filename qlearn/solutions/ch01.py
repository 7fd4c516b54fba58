"""Exercises of the chapter "One grade, many tokens"."""

import torch
from torch import Tensor

from qlearn.exact import preferences
from qlearn.exact.tree import TERMINAL, Levels, Tree
from qlearn.solutions import require_function, require_levels


def solution_1(n_words: int, horizon: int) -> tuple[int, int, int]:
    """(states, edges, answers) of the token MDP with `n_words` words and an end token."""
    states = sum(n_words**t for t in range(horizon))
    edges = (n_words + 1) * states
    return states, edges, edges - states + 1


def check_1(answer) -> None:
    require_function(answer)
    for n_words, horizon in ((2, 3), (1, 5), (3, 4), (4, 1)):
        tree = Tree.full(n_actions=n_words + 1, horizon=horizon, eos=0)
        truth = tree.n_states, tree.n_edges, len(tree.leaves())
        got = answer(n_words, horizon)
        assert isinstance(got, tuple | list) and len(got) == 3, "Return (states, edges, answers)."
        for name, mine, yours in zip(("states", "edges", "answers"), truth, got, strict=True):
            assert yours == mine, (
                f"{n_words} words, horizon {horizon}: {mine} {name}, not {yours}. "
                "A finished answer is not a state, and every state has all the tokens."
            )


def solution_2(tree: Tree, reward: Levels) -> Levels:
    """The same return of every answer, paid in full on its last token."""
    earned, paid = torch.zeros(len(tree.child[0]), dtype=torch.float64), []
    for table, r in zip(tree.child, reward, strict=True):
        total = earned[:, None] + r
        paid.append(torch.where(table == TERMINAL, total, 0.0))
        goes_on = table >= 0
        earned = torch.empty(int(goes_on.sum()), dtype=torch.float64)
        earned[table[goes_on]] = total[goes_on]
    return tuple(paid)


def check_2(answer) -> None:
    require_function(answer)
    for seed in range(3):
        tree, reward = _problem(seed)
        got = require_levels(answer(tree, reward), tree)
        for table, r in zip(tree.child, got, strict=True):
            assert not r[table != TERMINAL].any(), "A token that does not end the answer earns 0."
        difference = tree.path_sums(got) - tree.path_sums(reward)
        assert difference.abs().max() < 1e-9, "Some answer's return changed."


def bug_3(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The probability that the judge prefers `chosen`, from the rewards of its tokens, (T,)."""
    return preferences.bradley_terry_logp(chosen.mean(), rejected.mean()).exp()


def solution_3(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The probability that the judge prefers `chosen`, from the rewards of its tokens, (T,)."""
    return preferences.bradley_terry_logp(chosen.sum(), rejected.sum()).exp()


def check_3(answer) -> None:
    require_function(answer)
    generator = torch.Generator().manual_seed(13)
    for long, short in ((1, 1), (5, 2), (3, 8), (4, 4)):
        chosen, rejected = (
            torch.randn(n, generator=generator, dtype=torch.float64) for n in (long, short)
        )
        truth = 1 / (1 + (rejected.sum() - chosen.sum()).exp())
        got = answer(chosen, rejected)
        assert isinstance(got, int | float | Tensor), "Return one number."
        assert abs(float(got) - truth) < 1e-9, (
            f"Wrong for answers of {long} and {short} tokens. What does a judge compare?"
        )


def solution_4(tree: Tree, reward: Levels, word: int, pay: float) -> Levels:
    """The same preferences, while writing `word` as the first token earns `pay`."""
    changed = tuple(r.clone() for r in reward)
    change = pay - reward[0][0, word]
    changed[0][0, word] += change
    changed[1][tree.child[0][0, word]] -= change  # whatever is written next gives it back
    return changed


def check_4(answer) -> None:
    require_function(answer)
    for seed, (word, pay) in enumerate(((1, -10.0), (2, 10.0), (2, 0.0))):
        tree, reward = _problem(seed)
        before = tree.path_sums(reward)
        got = require_levels(answer(tree, reward, word, pay), tree)
        assert abs(got[0][0, word].item() - pay) < 1e-9, f"The first token {word} must earn {pay}."
        moved = tree.path_sums(got) - before
        assert moved.max() - moved.min() < 1e-9, "A judge could tell: some return moved alone."


def _problem(seed: int) -> tuple[Tree, Levels]:
    """A random reward on a tree of two words and end, three tokens deep."""
    tree = Tree.full(n_actions=3, horizon=3, eos=0)
    generator = torch.Generator().manual_seed(seed)
    return tree, tree.split(torch.randn(tree.n_edges, generator=generator, dtype=torch.float64))
