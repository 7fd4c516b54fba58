"""What stays behind in Σ_t β log π*/π_ref − R(y) + V*(s₀) when an assumption of Theorem 1 fails.

Each function predicts the leftover of every complete response from values alone; chapter 08
compares it with what the policy really implies. Under all assumptions the leftover is 0.
"""

from torch import Tensor

from qlearn.exact.chance import ChanceTree
from qlearn.exact.check import check_number, check_states
from qlearn.exact.tree import Levels, Tree


def chance_leftover(tree: ChanceTree, value: Levels) -> Tensor:
    """Σ_t ( E[V(s_{t+1}) | s_t, a_t] − V(s_{t+1}) ) of every realised response: (L,).

    In the order of `tree.realised.leaves()`. Its mean over the outcomes is 0, but a judge sees
    one outcome, and it does not cancel in Bradley-Terry.

    Raises: ValueError unless `value` has one number a state.
    Source: `eq-chance-leftover` in the book.
    """
    check_states(tree, value=value)
    realised, below = tree.realised, (*value[1:], None)
    expected = tree.spread(tuple(tree.next_value(t, below[t]) for t in range(tree.horizon)))
    happened = (*tree.lift(value)[1:], None)
    levels = (x - realised.next_value(t, happened[t]) for t, x in enumerate(expected))
    return realised.path_sums(tuple(levels))


def discount_leftover(tree: Tree, value: Levels, gamma: float) -> Tensor:
    """−(1 − γ) Σ_{t≥1} V(s_t) of every response, when γ < 1 and the log-ratios are not: (L,).

    Weighted by γ^t the log-ratios sum to the discounted return again.

    Raises: ValueError unless `value` has one number a state and γ lies in (0, 1].
    Source: `eq-discount-leftover` in the book.
    """
    check_states(tree, value=value)
    check_number("gamma", gamma, above=0, most=1)
    below = (*value[1:], None)
    after = tuple(tree.next_value(t, below[t]).contiguous() for t in range(tree.horizon))
    return -(1 - gamma) * tree.path_sums(after)


def truncation_leftover(tree: Tree, value: Levels, depth: int) -> Levels:
    """V(s_K) of every prefix of `depth` tokens, cut before its end: the row of V at that level.

    A response that ends earlier has leftover 0.

    Raises: ValueError for a depth at which no state is left, or unless `value` has one number a
    state.
    Source: `eq-truncation-leftover` in the book.
    """
    check_states(tree, value=value)
    if tree.horizon == 1:
        raise ValueError("Every response has one token, so none can be cut before its end.")
    if depth not in range(1, tree.horizon):
        raise ValueError(f"depth must lie between 1 and {tree.horizon - 1}, not {depth}.")
    return tree.next_value(depth - 1, value[depth])


def prompt_leftover(tree: Tree, value: Levels) -> Tensor:
    """V(s₀') − V(s₀) when answer i responds to prompt s₀ and answer j to s₀': (L, L).

    It is added to the true difference R_i − R_j; within a prompt it is 0.

    Raises: ValueError unless `value` has one number a state.
    Source: `eq-prompt-leftover` in the book.
    """
    check_states(tree, value=value)
    start = value[0][tree.prompt_of()]
    return start[None, :] - start[:, None]


def discounted(field: Levels, gamma: float) -> Levels:
    """γ^t x(s_t, a_t): an edge field weighted by the discount of its level.

    Raises: ValueError for γ outside (0, 1].
    """
    check_number("gamma", gamma, above=0, most=1)
    return tuple(gamma**t * x for t, x in enumerate(field))
