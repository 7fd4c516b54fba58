"""Borrowed advantages: EFT, proxy tuning and DeRa are one formula; when is it exact? (G1, G2)

log π ∝ log π_base + α (log π_tuned − log π_untuned), token by token (Eqs 14 and 15). A small tuned
pair lends its soft advantages, β₀ log(π_tuned/π_untuned), to a larger base; with the untuned model
itself as the base (DeRa) the mix aims at the optimum of another price, β₀/α. The map below says
how far the mix is from the exact optimum that it aims at.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from qlearn.exact.search import tilt
from qlearn.exact.soft import expected_return, objective, sequence_kl, soft_backup
from qlearn.exact.tree import Levels, Tree
from qlearn.lm.cursor import Mixture
from qlearn.lm.models import check_same_vocabulary
from qlearn.lm.worlds import World

HORIZONS = (1, 2, 3, 4, 5, 6)
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
BETA = 0.5  # the price at which the tuned model of the map is optimal


def tilted(
    base: PreTrainedModel, tuned: PreTrainedModel, untuned: PreTrainedModel, alpha: float
) -> Mixture:
    """The policy log π ∝ log π_base + α (log π_tuned − log π_untuned), for any decoder.

      EFT, proxy tuning   a large base, a small tuned and untuned pair, α = 1
      DeRa                base = untuned: α = 0 is the untuned model, α = 1 the tuned one

    Raises: InputError where the three do not share a vocabulary.
    Source: Eqs 14 and 15, with the exponent that the paper's β leaves out; `eq-borrowed` in the
    book.
    """
    for model in (tuned, untuned):
        check_same_vocabulary(base, model)
    if base is untuned:  # two passes instead of three
        return Mixture((base, tuned), lambda b, t: tilt(b, t, b, alpha))
    return Mixture((base, tuned, untuned), lambda b, t, u: tilt(b, t, u, alpha))


def mix(base: Levels, tuned: Levels, untuned: Levels, alpha: float) -> Levels:
    """The same formula on an exact tree; what the untuned policy never writes is not lent.

    Where the tuned policy is an exact optimum this is a tilt by soft advantages.

    Source: Eq. 15; `eq-borrowed-advantage` in the book.
    """
    lent = (
        (b, t.masked_fill(u == -torch.inf, 0.0), u.masked_fill(u == -torch.inf, 0.0))
        for b, t, u in zip(base, tuned, untuned, strict=True)
    )
    return tuple(tilt(b, t, u, alpha) for b, t, u in lent)


def gap(tree: Tree, reward: Levels, base: Levels, untuned: Levels, beta: float, alpha: float):
    """How far the mix is from the exact tilt π_base exp(α R/β)/Z that it aims at.

    Returns (largest |log-probability difference| of a response, KL(exact ‖ mix)), in nats. The
    tuned model is the exact optimum at `beta` with the untuned one as its reference.

    Source: `thm-when-exact` in the book.
    """
    tuned = soft_backup(tree, reward, untuned, beta).logp
    # As α → 0 the exact tilt is the base itself.
    exact = soft_backup(tree, reward, base, beta / alpha).logp if alpha else base
    mixed = mix(base, tuned, untuned, alpha)
    worst = (tree.path_sums(exact) - tree.path_sums(mixed)).abs().max()
    return worst.item(), sequence_kl(tree, exact, mixed)[0].item()


def random_problem(horizon: int, seed: int, n_actions: int = 4):
    """(tree, reward, two policies) with independent normal rewards and logits."""
    tree = Tree.full(n_actions, horizon, eos=0)
    draws = torch.Generator().manual_seed(seed)
    fields = (
        tuple(torch.randn(s, generator=draws, dtype=torch.float64) for s in tree.shapes)
        for _ in range(3)
    )
    reward, one, two = fields
    return tree, reward, *(tuple(x.log_softmax(-1) for x in field) for field in (one, two))


def additive_problem(horizon: int, seed: int, n_actions: int = 4):
    """The same with rewards and policies that depend on the position only, and one length (E3)."""
    tree = Tree.full(n_actions, horizon, eos=None)
    draws = torch.randn(
        3, horizon, n_actions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    reward, one, two = (
        tuple(x.expand(n, -1) for x, (n, _) in zip(field, tree.shapes, strict=True))
        for field in (draws[0], *draws[1:].log_softmax(-1))
    )
    return tree, reward, one, two


def exactness_map(problem, seeds: Sequence[int], same_base: bool) -> dict[str, dict]:
    """`gap` over horizon and exponent: {horizon: {alpha: {mean, most, kl}}}, over seeds."""
    table: dict = {}
    for horizon in HORIZONS:
        for alpha in ALPHAS:
            found = []
            for seed in seeds:
                tree, reward, untuned, other = problem(horizon, seed)
                base = untuned if same_base else other
                found.append(gap(tree, reward, base, untuned, BETA, alpha))
            worst, kl = (torch.tensor(x) for x in zip(*found, strict=True))
            cell = {"mean": worst.mean().item(), "most": worst.max().item(), "kl": kl.mean().item()}
            table.setdefault(str(horizon), {})[key(alpha)] = cell
    return table


def slot_world_dera(world: World) -> dict[str, dict]:
    """DeRa in the slot world, exactly: the mix at each α against the optimum at β/α.

    reward: expected true reward; objective: J at the price β/α, at most `value`; kl: KL(exact ‖
    mix) in nats a response.
    """
    tree, _ = world.graph
    reward = world.field(lambda edge: edge.reward, 0.0)
    tuned = world.solve(BETA).logp
    found = {}
    for alpha in (a for a in ALPHAS if a):
        mixed = mix(world.log_ref, tuned, world.log_ref, alpha)
        exact = world.solve(BETA / alpha)
        found[key(alpha)] = {
            "mixed_reward": expected_return(tree, mixed, reward)[0].item(),
            "exact_reward": expected_return(tree, exact.logp, reward)[0].item(),
            "mixed_objective": objective(tree, mixed, reward, world.log_ref, BETA / alpha)[
                0
            ].item(),
            "value": exact.value[0].item(),
            "kl": sequence_kl(tree, exact.logp, mixed)[0].item(),
        }
    return found


def key(alpha: float) -> str:
    """An exponent as a key of a results file, which dots would break: 0.25 is "0_25"."""
    return f"{alpha:g}".replace(".", "_")


def run(seeds: Sequence[int]) -> dict:
    """The results file `proxy_map`."""
    return {
        "seeds": list(seeds),
        "beta": BETA,
        "same_base": exactness_map(random_problem, seeds, same_base=True),
        "other_base": exactness_map(random_problem, seeds, same_base=False),
        "additive": exactness_map(additive_problem, seeds, same_base=False),
        "slot_world": slot_world_dera(World()),
    }
