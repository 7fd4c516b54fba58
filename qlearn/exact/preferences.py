"""Preferences and returns: Bradley-Terry, Plackett-Luce, maximum likelihood (Eq. 1, Theorem 1).

A score is the return of a complete response, Σ_t r(s_t, a_t), or anything that stands in for it,
such as the implicit return of a policy. Scores are in nats: a difference of 1 means odds of e.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from qlearn.exact.check import check_tensors
from qlearn.exact.optimise import minimise
from qlearn.exact.tree import Tree


def bradley_terry_logp(winner: Tensor, loser: Tensor) -> Tensor:
    """log p(winner ≻ loser) = log σ(R_w − R_l), elementwise; (L, 1) beside (1, L) is all pairs.

    Raises: ValueError unless both are of floats and have as many axes.
    Source: Eq. 1; `eq-bradley-terry` in the book.
    """
    check_tensors(broadcast=True, winner=winner, loser=loser)
    return logsigmoid(winner - loser)


def plackett_luce_logp(scores: Tensor) -> Tensor:
    """log p(ranking) = −Σ_k log Σ_{j≥k} exp(R_j − R_k) for scores (..., K), best first: (...).

    With K = 2 it is Bradley-Terry; with one or no answer to rank it is 0.

    Raises: ValueError for a single number, or scores that are not finite.
    Source: the rankings of Theorem 1; `eq-plackett-luce` in the book.
    """
    _check_scores(scores=scores)
    gap = scores[..., None, :] - scores[..., :, None]  # R_j − R_k: (..., K, K), row k
    placed = torch.ones_like(gap, dtype=torch.bool).tril(-1)  # j < k
    return -gap.masked_fill(placed, -torch.inf).logsumexp(dim=-1).sum(dim=-1)


def sample_preferences(a: Tensor, b: Tensor, generator: torch.Generator) -> Tensor:
    """True where a Bradley-Terry judge prefers a to b: bool, of the shape of `a`.

    Raises: ValueError unless both are of floats, of one shape and finite.
    """
    _check_finite(a=a, b=b)
    coin = torch.rand(a.shape, generator=generator, dtype=torch.float64)
    return coin < bradley_terry_logp(a, b).double().exp()


def population_loss(score: Tensor, true_score: Tensor) -> Tensor:
    """E[ −log p_score(y ≻ y') ] when a judge with `true_score` labels every pair equally often.

    −2/(L(L−1)) Σ_{i≠j} σ(R_i − R_j) log σ(S_i − S_j), the loss of infinitely many labels. Its
    minimum is the judge's own entropy, reached exactly where S − R is constant. A prompt with one
    response has no pair: its loss is 0, whatever the scores.

    Shapes: score and true_score (L,), the responses of one prompt; returns a scalar, in nats.
    Raises: ValueError for scores of different shapes or that are not finite.
    Source: Eq. 9 with exact expectations; `eq-population-loss` in the book.
    """
    _check_scores(score=score, true_score=true_score)
    n = len(score)
    i, j = (~torch.eye(n, dtype=torch.bool)).nonzero(as_tuple=True)  # every ordered pair
    wins = bradley_terry_logp(true_score[i], true_score[j]).exp()
    losses = -wins * bradley_terry_logp(score[i], score[j])
    return losses.sum() / max(n * (n - 1) / 2, 1)


def count_wins(tree: Tree, winners: Tensor, losers: Tensor) -> Tensor:
    """How often response i beat response j: float64 (L, L), from response numbers (N,), (N,).

    Raises: ValueError for a response that does not exist, or for a pair whose two responses answer
    different prompts, naming the row; for numbers that are not whole or rows of unequal length.
    """
    prompt = tree.prompt_of()
    winners, losers = torch.as_tensor(winners), torch.as_tensor(losers)
    if winners.ndim != 1 or winners.shape != losers.shape:
        shapes = f"{tuple(winners.shape)} and {tuple(losers.shape)}"
        raise ValueError(f"winners and losers must be two rows of one length, not {shapes}.")
    for name, index in (("winners", winners), ("losers", losers)):
        if len(index) and (index.is_floating_point() or index.dtype == torch.bool):
            raise ValueError(f"{name} must hold the numbers of responses, not {index.dtype}.")
        outside = (index < 0) | (index >= len(prompt))
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"{name}[{row}] is {int(index[row])}; there are {len(prompt)} responses."
            )
    winners, losers = winners.long(), losers.long()
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
    in two groups somebody of each has beaten somebody of the other (Ford, 1957). One response has
    return 0.

    Raises: ValueError where it does not exist, naming a response that is to blame; for counts that
    are negative, not finite, or too uneven for float64 to find the maximum.
    Source: the reward model of Eq. 1; `eq-reward-model` in the book.
    """
    wins = torch.as_tensor(wins).double()
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or not len(wins):
        raise ValueError(f"wins must be a square table, (L, L), not {tuple(wins.shape)}.")
    if not (wins.isfinite() & (wins >= 0)).all():
        raise ValueError("wins must hold counts: finite numbers that are not negative.")
    n = len(wins)
    if n == 1:
        return torch.zeros(1, dtype=torch.float64)
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
    share = (wins / wins.max()).fill_diagonal_(0)  # a response against itself says nothing
    share = share / share.sum()

    def loss(returns):
        return -(share * bradley_terry_logp(returns[:, None], returns[None, :])).sum()

    # What a vote gives to one response it takes from another, so the mean stays 0.
    returns = minimise(loss, torch.zeros(n, dtype=torch.float64))
    # At the maximum every response wins as often as it should.
    expected = (share + share.T) * torch.sigmoid(returns[:, None] - returns[None, :])
    won, lost = share.sum(dim=1), share.sum(dim=0)
    off = (expected.sum(dim=1) - won).abs() / won.minimum(lost)
    if not off.max() <= 1e-4:
        raise ValueError(
            f"The votes on response {int(off.argmax())} are too uneven for float64 to find the "
            "most likely returns; leave out what is all but certain, or count fewer votes of it."
        )
    return returns


def _check_scores(**scores: Tensor) -> None:
    """Raises ValueError unless the scores are rows of finite floats, of one shape."""
    _check_finite(**scores)
    for name, x in scores.items():
        if not x.ndim:
            raise ValueError(f"{name} must be a row of scores, one an answer, not one number.")


def _check_finite(**tensors: Tensor) -> None:
    check_tensors(**tensors)
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise ValueError(f"{name} must be finite; it holds {x[~x.isfinite()][0]}.")
