"""Preferences from returns: Bradley-Terry and Plackett-Luce (Eq. 1 and Theorem 1 of the paper).

A score is the return of a complete response, Σ_t r(s_t, a_t), or anything that stands in for it,
such as the implicit return of a policy. Scores are in nats: a difference of 1 means odds of e.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_logp(winner: Tensor, loser: Tensor) -> Tensor:
    """log p(winner ≻ loser) = log σ(R_w − R_l), elementwise.

    Source: Eq. 1; `eq-bradley-terry` in the book.
    """
    return logsigmoid(winner - loser)


def plackett_luce_logp(scores: Tensor) -> Tensor:
    """log p(ranking) = Σ_k [ R_k − log Σ_{j≥k} exp R_j ] for scores (..., K), best first: (...).

    With K = 2 it is Bradley-Terry.

    Source: the rankings of Theorem 1.
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
