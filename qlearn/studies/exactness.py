"""When is a borrowed advantage exact? A map over horizon and exponent: chapter 13 (G1, G2).

`qlearn.findings.proxy.gap` on random trees, where the theory says that it is 0 and where not, and
DeRa in the slot world by enumeration.
"""

from collections.abc import Sequence
from statistics import fmean

import torch

from qlearn.exact.soft import expected_return, objective, sequence_kl
from qlearn.exact.tree import Tree
from qlearn.findings.proxy import gap, mix
from qlearn.lm.worlds import World
from qlearn.studies.slot_world import summarise

HORIZONS = (1, 2, 3, 4, 5, 6)
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
BETA = 0.5  # the price at which the tuned model of the map is optimal


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
    """`gap` over horizon and exponent: {horizon: {alpha: {mean, low, high, least, most, kl}}}.

    The largest error of a response, its mean over seeds with Student's 95 % interval and its
    extremes, and the mean KL.
    """
    table: dict = {}
    for horizon in HORIZONS:
        for alpha in ALPHAS:
            found = []
            for seed in seeds:
                tree, reward, untuned, other = problem(horizon, seed)
                base = untuned if same_base else other
                found.append(gap(tree, reward, base, untuned, BETA, alpha))
            cell = summarise([{"worst": worst} for worst, _ in found])["worst"]
            cell["kl"] = fmean(kl for _, kl in found)
            table.setdefault(str(horizon), {})[key(alpha)] = cell
    return table


def slot_world_dera(world: World) -> dict[str, dict]:
    """DeRa in the slot world, exactly: the mix at each α against the optimum at β/α.

    reward: expected true reward; objective: J at the price β/α, at most `value`; lost: what it
    falls short of `value`, which is (β/α) · kl; kl: KL(mix ‖ exact) in nats a response.
    """
    tree, _ = world.graph
    reward = world.field(lambda edge: edge.reward, 0.0)
    tuned = world.solve(BETA).logp
    found = {}
    for alpha in (a for a in ALPHAS if a):
        mixed = mix(world.log_ref, tuned, world.log_ref, alpha)
        exact = world.solve(BETA / alpha)
        value = exact.value[0].item()
        earned = objective(tree, mixed, reward, world.log_ref, BETA / alpha)[0].item()
        found[key(alpha)] = {
            "mixed_reward": expected_return(tree, mixed, reward)[0].item(),
            "exact_reward": expected_return(tree, exact.logp, reward)[0].item(),
            "mixed_objective": earned,
            "value": value,
            "lost": value - earned,
            "kl": sequence_kl(tree, mixed, exact.logp)[0].item(),
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
