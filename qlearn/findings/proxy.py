"""Borrowed advantages: EFT, proxy tuning and DeRa are one formula; when is it exact? (G1, G2)

log π ∝ log π_base + α (log π_tuned − log π_untuned), token by token (Eqs 14 and 15). A small tuned
pair lends its soft advantages, β₀ log(π_tuned/π_untuned), to a larger base; with the untuned model
itself as the base (DeRa) the mix aims at the optimum of another price, β₀/α. `gap` says how
far the mix is from the exact optimum that it aims at.
"""

import math

from transformers import PreTrainedModel

from qlearn.exact.check import check_alike, check_number
from qlearn.exact.search import tilt
from qlearn.exact.soft import sequence_kl, soft_backup
from qlearn.exact.tree import Levels, Tree
from qlearn.lm.cursor import Mixture
from qlearn.lm.models import check_same_vocabulary


def tilted(
    base: PreTrainedModel, tuned: PreTrainedModel, untuned: PreTrainedModel, alpha: float
) -> Mixture:
    """The policy log π ∝ log π_base + α (log π_tuned − log π_untuned), for any decoder.

      EFT, proxy tuning   a large base, a small tuned and untuned pair, α = 1
      DeRa                base = untuned: α = 0 is the untuned model, α = 1 the tuned one

    Raises: InputError where the three do not share a vocabulary, ValueError for α not finite.
    Source: Eqs 14 and 15, with the exponent that the paper's β leaves out; `eq-borrowed` in the
    book.
    """
    check_number("alpha", alpha)
    for model in (tuned, untuned):
        check_same_vocabulary(base, model)
    if base is untuned:  # two passes instead of three
        return Mixture((base, tuned), lambda b, t: tilt(b, t, b, alpha))
    return Mixture((base, tuned, untuned), lambda b, t, u: tilt(b, t, u, alpha))


def mix(base: Levels, tuned: Levels, untuned: Levels, alpha: float) -> Levels:
    """The same formula on an exact tree; what the untuned policy never writes is not lent.

    Where the tuned policy is an exact optimum this is a tilt by soft advantages.

    Raises: ValueError for fields of different shapes, or as `tilt`.
    Source: Eq. 15; `eq-borrowed-advantage` in the book.
    """
    check_alike(base=base, tuned=tuned, untuned=untuned)
    return tuple(tilt(b, t, u, alpha) for b, t, u in zip(base, tuned, untuned, strict=True))


def gap(tree: Tree, reward: Levels, base: Levels, untuned: Levels, beta: float, alpha: float):
    """How far the mix is from the exact tilt π_base exp(α R/β)/Z that it aims at.

    Returns (largest |log-probability difference| of a response, KL(mix ‖ exact)), in nats. The
    tuned model is the exact optimum at `beta` with the untuned one as its reference. For α > 0 the
    mix loses (beta / alpha) · KL(mix ‖ exact) of the objective at the price beta / alpha.

    Raises: as `soft_backup`, and for α that is negative or not finite.
    Source: `thm-when-exact` and `eq-regret` in the book.
    """
    check_number("alpha", alpha, least=0)
    tuned = soft_backup(tree, reward, untuned, beta).logp
    price = beta / alpha if alpha else math.inf
    # As α → 0 the exact tilt is the base itself.
    exact = base if math.isinf(price) else soft_backup(tree, reward, base, price).logp
    mixed = mix(base, tuned, untuned, alpha)
    worst = (tree.path_sums(exact) - tree.path_sums(mixed)).abs().max()
    return worst.item(), sequence_kl(tree, mixed, exact)[0].item()
