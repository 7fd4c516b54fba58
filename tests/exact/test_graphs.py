"""Layered graphs: diffusion chains, two stages, and graphs given by hand (Lemma 2, Eqs 17, 18)."""

import itertools
import math

import pytest
import torch

from qlearn.exact import shaping, soft, training
from qlearn.exact.chance import with_chance
from qlearn.exact.tree import ABSENT, TERMINAL, Tree, lift

from . import oracle
from .worlds import BETAS, SEEDS, flat, furthest, random_field, random_states

SIZES = (3, 4, 3)  # values of each denoising step


def chain(seed):
    tree = Tree.layered(SIZES)
    log_ref = tuple(x.log_softmax(-1) for x in random_field(tree, seed + 500))
    return tree, random_field(tree, seed), log_ref


def along(path, field, start=0):
    """Σ_{t ≥ start} x(s_t, a_t) of a path of values: the state is the value picked last."""
    rows = list(zip(field, (0, *path[:-1]), path, strict=True))
    return math.fsum(x[s, a].item() for x, s, a in rows[start:])


@pytest.mark.parametrize("beta", BETAS)
def test_claim_merging_states_keep_every_identity(beta):
    """I1: on a denoising chain: V by all paths, r ↔ Q (B1), and Theorem 1's preferences (C1).

    `eq-diffusion-bellman`, `lem-diffusion`
    """
    paths = list(itertools.product(*map(range, SIZES)))
    for seed in SEEDS:
        tree, reward, log_ref = chain(seed)
        best = soft.soft_backup(tree, reward, log_ref, beta)
        for t in range(3):
            for s in range(tree.shapes[t][0]):
                start = (0,) * (t - 1) + (s,) if t else ()
                ahead = [(*start, *rest) for rest in itertools.product(*map(range, SIZES[t:]))]
                done_ref, done = (
                    math.fsum(
                        x[i, j].item() for x, i, j in zip(f, (0, *start), start, strict=False)
                    )
                    for f in (log_ref, reward)
                )
                terms = [
                    along(y, log_ref) - done_ref + (along(y, reward) - done) / beta for y in ahead
                ]
                assert abs(best.value[t][s].item() - beta * oracle.log_sum_exp(terms)) < 1e-10
        back = soft.reward_from_q(tree, best.q, log_ref, beta)
        assert (flat(back) - flat(reward)).abs().max() < 1e-10
        learned = shaping.canonical_reward(tree, reward, log_ref, beta)
        shifts = [along(y, reward) - along(y, learned) for y in paths]
        assert max(shifts) - min(shifts) < 1e-10
        assert abs(shifts[0] - best.value[0].item()) < 1e-10
        potential = random_states(tree, seed)
        shaped = shaping.shape_reward(tree, reward, potential)
        found = shaping.find_potential(tree, reward, shaped)
        assert furthest(found, potential) < 1e-10


def test_claim_unfolding_a_chain_changes_nothing():
    tree, reward, log_ref = chain(1)
    unfolded, rows = tree.unfold()
    assert [y[1:] for y in unfolded.leaves()] == list(itertools.product(*map(range, SIZES)))
    best = soft.soft_backup(tree, reward, log_ref, 0.5)
    again = soft.soft_backup(unfolded, lift(reward, rows), lift(log_ref, rows), 0.5)
    assert (flat(lift(best.q, rows)) - flat(again.q)).abs().max() < 1e-12
    sums = unfolded.path_sums(lift(reward, rows)).tolist()
    assert sums == pytest.approx([along(y[1:], reward) for y in unfolded.leaves()])
    mass = soft.reach(tree, best.logp)
    spread = soft.reach(unfolded, again.logp)
    for t, m in enumerate(mass):
        gathered = torch.zeros_like(m).index_add(0, rows[t], spread[t])
        assert (gathered - m).abs().max() < 1e-12
    alike = with_chance(tree, tree.child, 0.4)
    by_chance = soft.soft_backup(alike, reward, log_ref, 0.5)
    assert (flat(by_chance.q) - flat(best.q)).abs().max() < 1e-12


def test_eq_18_joint_training_finds_the_optimum_and_stages_do_not():
    """I2: refiner (price β₁) then image (β₂): joint DPO to KL 1e-8; each stage alone stays off.

    The refiner alone is fitted to the judge's choices averaged over reference images, as its own
    DPO would be; its log-odds are a mean of sigmoids, not the sigmoid of a soft value.
    `eq-two-stage`, `eq-two-stage-loss`, `eq-state-beta`
    """
    n, m, b1, b2 = 3, 4, 0.5, 0.2
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        tree = Tree.full(4, 2, eos=None)
        child = (tree.child[0][:, :n], tree.child[1][:n])
        tree = Tree(child)
        returns = torch.randn(n, m, generator=generator, dtype=torch.float64)
        log_ref = tuple(x.log_softmax(-1) for x in random_field(tree, seed + 40))
        price = (torch.tensor([b1]).double(), torch.full((n,), b2, dtype=torch.float64))
        # The optimum by hand: soft values of the images, then of the refiner.
        value = [
            b2 * oracle.log_sum_exp((log_ref[1][z] + returns[z] / b2).tolist()) for z in range(n)
        ]
        top = b1 * oracle.log_sum_exp([log_ref[0][0, z].item() + value[z] / b1 for z in range(n)])
        best = {
            (z, y): log_ref[0][0, z].item() + (value[z] - top) / b1
            + log_ref[1][z, y].item() + (returns[z, y].item() - value[z]) / b2
            for z in range(n) for y in range(m)
        }  # fmt: skip
        start = tuple(x.log_softmax(-1) for x in random_field(tree, seed + 90))
        joint = training.train_dpo(tree, returns.flatten(), log_ref, price, start)

        def divergence(logp, best=best):
            return math.fsum(
                math.exp(x) * (x - logp[0][0, z].item() - logp[1][z, y].item())
                for (z, y), x in best.items()
            )

        assert divergence(joint) < 1e-8
        image = (log_ref[1] + returns / b2).log_softmax(-1)
        p = log_ref[1].exp()
        wins = torch.zeros(n, n, dtype=torch.float64)
        for z, w in itertools.product(range(n), repeat=2):
            odds = 1 / (1 + (returns[w][None, :] - returns[z][:, None]).exp())
            wins[z, w] = (p[z][:, None] * p[w][None, :] * odds).sum()
        logits = torch.linalg.lstsq(_differences(n), _log_odds(wins)).solution
        refiner = (log_ref[0][0] + logits / b1).log_softmax(0)[None]
        staged = divergence((refiner, image))
        assert staged > 1e-3


def _differences(n):
    pairs = list(itertools.combinations(range(n), 2))
    rows = torch.zeros(len(pairs), n, dtype=torch.float64)
    for k, (i, j) in enumerate(pairs):
        rows[k, i], rows[k, j] = 1, -1
    return rows


def _log_odds(wins):
    pairs = itertools.combinations(range(len(wins)), 2)
    return torch.stack([(wins[i, j] / wins[j, i]).log() for i, j in pairs])


def test_claim_gaussian_steps_compare_squared_errors():
    """log N(x; μ, σ²) − log N(x; μ_ref, σ²) = (|x − μ_ref|² − |x − μ|²) / 2σ².

    `eq-gaussian-step`
    """
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        x, mean, ref = torch.randn(3, generator=generator, dtype=torch.float64)
        sigma = 0.3 + seed / 50
        ratio = torch.distributions.Normal(mean, sigma).log_prob(x)
        ratio = ratio - torch.distributions.Normal(ref, sigma).log_prob(x)
        assert abs(ratio - ((x - ref) ** 2 - (x - mean) ** 2) / (2 * sigma**2)) < 1e-10


def test_claim_graphs_by_hand_become_trees_or_say_why_not():
    graph = {"x": ["a", "b", None], "a": [None, "c"], "b": ["c", None], "c": [None]}
    tree, states = Tree.from_graph(graph, ["x"])
    assert states == (["x"], ["a", "b"], ["c"])
    assert [t.tolist() for t in tree.child] == [
        [[0, 1, -1]], [[-1, 0, -2], [0, -1, -2]], [[-1, -2, -2]],
    ]  # fmt: skip
    assert tree.n_edges == 8 and len(tree.unfold()[0].leaves()) == 5
    later = {"x": ["a", None], "a": ["b", None], "b": [None], "y": ["b"]}
    tree, states = Tree.from_graph(later, ["x", "y"])
    assert states == (["x", "y"], ["a", "b"], ["b"])
    with pytest.raises(ValueError, match=r"loop, '[ab]' → '[ab]' → '[ab]'"):
        Tree.from_graph({"x": ["a"], "a": ["b"], "b": ["a", None]}, ["x"])
    with pytest.raises(ValueError, match="State 'x' leads to 'z', which is not a state"):
        Tree.from_graph({"x": ["z"]}, ["x"])
    with pytest.raises(ValueError, match="prompt 'q' is not a state"):
        Tree.from_graph({"x": [None]}, ["q"])
    with pytest.raises(ValueError, match="at least one prompt"):
        Tree.from_graph({"x": [None]}, [])
    with pytest.raises(ValueError, match="at least one level"):
        Tree.layered([])


def test_claim_an_absent_action_has_no_implicit_reward():
    """log π and log π_ref are both −∞ there; their difference is 0 by definition, never NaN."""
    tree = Tree((torch.tensor([[TERMINAL, ABSENT, TERMINAL]]),))
    reward = (torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64),)
    log_ref = (torch.tensor([[0.25, 0.0, 0.75]], dtype=torch.float64).log(),)
    best = soft.soft_backup(tree, reward, log_ref, 0.5)
    found = soft.implicit_rewards(best.logp, log_ref, 0.5)[0][0].tolist()
    v = 0.5 * math.log(0.25 * math.exp(2) + 0.75 * math.exp(-2))
    assert found == [pytest.approx(1 - v), 0.0, pytest.approx(-1 - v)]


def test_claim_a_reference_that_writes_an_absent_action_is_named():
    """The sentence points at the action that is wrong, not at the first that is absent."""
    tree = Tree((torch.tensor([[ABSENT, ABSENT, TERMINAL]]),))
    log_ref = (torch.tensor([[-math.inf, -9.0, 0.0]], dtype=torch.float64),)
    reward = (torch.zeros(1, 3, dtype=torch.float64),)
    with pytest.raises(ValueError, match="must be -inf for action 1 in state 0 of level 0"):
        soft.soft_backup(tree, reward, log_ref, 0.5)
