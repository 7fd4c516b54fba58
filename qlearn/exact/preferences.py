"""Preferences and returns: Bradley-Terry, Plackett-Luce, maximum likelihood (Eq. 1, Theorem 1).

A score is the return of a complete response, Σ_t r(s_t, a_t), or anything that stands in for it,
such as the implicit return of a policy. Scores are in nats: a difference of 1 means odds of e.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from qlearn.exact.optimise import minimise
from qlearn.exact.tree import Tree


def bradley_terry_logp(winner: Tensor, loser: Tensor) -> Tensor:
    """log p(winner ≻ loser) = log σ(R_w − R_l), elementwise.

    Source: Eq. 1; `eq-bradley-terry` in the book.
    """
    return logsigmoid(winner - loser)


def plackett_luce_logp(scores: Tensor) -> Tensor:
    """log p(ranking) = Σ_k [ R_k − log Σ_{j≥k} exp R_j ] for scores (..., K), best first: (...).

    With K = 2 it is Bradley-Terry.

    Source: the rankings of Theorem 1; `eq-plackett-luce` in the book.
    """
    remaining = torch.logcumsumexp(scores.flip(-1), dim=-1).flip(-1)
    return (scores - remaining).sum(dim=-1)


def sample_preferences(a: Tensor, b: Tensor, generator: torch.Generator) -> Tensor:
    """True where a Bradley-Terry judge prefers a to b: bool, of the shape of `a`."""
    coin = torch.rand(a.shape, generator=generator, dtype=torch.float64)
    return coin < bradley_terry_logp(a, b).double().exp()


def population_loss(score: Tensor, true_score: Tensor) -> Tensor:
    """E[ −log p_score(y ≻ y') ] when a judge with `true_score` labels every pair equally often.

    −2/(L(L−1)) Σ_{i≠j} σ(R_i − R_j) log σ(S_i − S_j), the loss of infinitely many labels. Its
    minimum is the judge's own entropy, reached exactly where S − R is constant.

    Shapes: score and true_score (L,), the responses of one prompt; returns a scalar, in nats.
    Source: Eq. 9 with exact expectations; `eq-population-loss` in the book.
    """
    n = len(score)
    wins = bradley_terry_logp(true_score[:, None], true_score[None, :]).exp()
    losses = -wins * bradley_terry_logp(score[:, None], score[None, :])
    return (losses.sum() - losses.diagonal().sum()) / (n * (n - 1) / 2)


def count_wins(tree: Tree, winners: Tensor, losers: Tensor) -> Tensor:
    """How often response i beat response j: float64 (L, L), from response numbers (N,), (N,).

    Raises: ValueError for a response that does not exist, or for a pair whose two responses answer
    different prompts, naming the row.
    """
    prompt = tree.prompt_of()
    for name, index in (("winners", winners), ("losers", losers)):
        outside = (index < 0) | (index >= len(prompt))
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"{name}[{row}] is {int(index[row])}; there are {len(prompt)} responses."
            )
    crossed = prompt[winners] != prompt[losers]
    if crossed.any():
        row = int(crossed.nonzero()[0])
        one, two = int(prompt[winners[row]]), int(prompt[losers[row]])
        raise ValueError(
            f"Pair {row} compares answers to different prompts, {one} and {two}; their values do "
            "not cancel, so such a pair says nothing that DPO could use."
        )
    wins = torch.zeros(len(prompt), len(prompt), dtype=torch.float64)
    ones = torch.ones(len(winners), dtype=torch.float64)
    return wins.index_put((winners, losers), ones, accumulate=True)


def fit_returns(wins: Tensor) -> Tensor:
    """The returns that make the votes most likely under Bradley-Terry, with mean 0: (L,).

    argmax_R Σ_ij wins_ij log σ(R_i − R_j). `wins` (L, L) holds counts, or any weights ≥ 0. The
    maximum exists and is unique up to a constant if and only if for every split of the responses
    in two groups somebody of each has beaten somebody of the other (Ford, 1957).

    Raises: ValueError where it does not exist, naming a response that is to blame.
    Source: the reward model of Eq. 1; `eq-reward-model` in the book.
    """
    n = len(wins)
    beats = ((wins > 0) | torch.eye(n, dtype=torch.bool)).double()
    for _ in range(n.bit_length()):  # chains of victories of every length
        beats = ((beats @ beats) > 0).double()
    apart = (beats == 0).nonzero()
    if len(apart):
        i, j = apart[0].tolist()
        raise ValueError(
            f"No chain of victories leads from response {i} to response {j}, so the most likely "
            "difference of their returns is infinite; collect votes that connect them."
        )
    share = normalize(wins, p=1, dim=(0, 1))

    def loss(returns):
        return -(share * bradley_terry_logp(returns[:, None], returns[None, :])).sum()

    # What a vote gives to one response it takes from another, so the mean stays 0.
    return minimise(loss, torch.zeros(n, dtype=torch.float64))
