"""The map of exactness: DeRa in a whole world, by enumeration."""

import math

import pytest

from qlearn.lm.worlds import SlotWorld
from qlearn.studies import exactness
from qlearn.studies.slot_world import summarise


def test_claim_dera_in_the_slot_world_loses_the_kl_it_misses():
    """J of the mix at β/α is V* less β/α · KL(mix ‖ exact): at most V*, and V* itself at α = 1."""
    found = exactness.slot_world_dera(SlotWorld())
    for alpha, row in found.items():
        assert row["mixed_objective"] <= row["value"] + 1e-10
        assert row["kl"] > 1e-3 or alpha == "1"
    assert abs(found["1"]["mixed_objective"] - found["1"]["value"]) < 1e-10
    assert found["4"]["value"] - found["4"]["mixed_objective"] > 0.01


def walk(world, policy, numbers):
    """E of Σ number over the lines of `policy`, by recursion; {state: a row}."""
    known = {}

    def visit(state):
        if state[0] is None:
            return 0.0
        if state not in known:
            rows = zip(world.edges(*state), policy[state], numbers[state], strict=True)
            known[state] = math.fsum(
                math.exp(p) * (x + visit((edge.node, edge.memory))) for edge, p, x in rows
            )
        return known[state]

    return visit(world.start)


def optimum(world, price):
    """({state: V}, {state: log π* of its edges}) from the edges, no tree and no Q."""
    values, logp = {}, {}

    def visit(state):
        if state[0] is None:
            return 0.0
        if state not in values:
            edges = world.edges(*state)
            terms = [e.prob * math.exp((e.reward + visit((e.node, e.memory))) / price)
                     for e in edges]  # fmt: skip
            values[state] = price * math.log(math.fsum(terms))
            logp[state] = [math.log(x) - values[state] / price for x in terms]
        return values[state]

    visit(world.start)
    return values, logp


@pytest.mark.parametrize("alpha", [a for a in exactness.ALPHAS if a])
def test_claim_dera_agrees_with_a_walk_through_the_grammar(alpha):
    """Rewards, J, V* and KL(mix ‖ optimum at β/α) by recursion; V* − J is β/α times that KL."""
    world, price = SlotWorld(), exactness.BETA / alpha
    values, exact = optimum(world, price)
    _, tuned = optimum(world, exactness.BETA)
    mixed, reward, cost, distance = {}, {}, {}, {}
    for state, row in tuned.items():
        edges = world.edges(*state)
        ref = [math.log(e.prob) for e in edges]
        lent = [q + alpha * (p - q) for p, q in zip(row, ref, strict=True)]
        log_z = math.log(math.fsum(map(math.exp, lent)))
        mixed[state] = [x - log_z for x in lent]
        reward[state] = [e.reward for e in edges]
        cost[state] = [price * (p - q) for p, q in zip(mixed[state], ref, strict=True)]
        distance[state] = [p - q for p, q in zip(mixed[state], exact[state], strict=True)]
    expected = {
        "mixed_reward": walk(world, mixed, reward),
        "exact_reward": walk(world, exact, reward),
        "mixed_objective": walk(world, mixed, reward) - walk(world, mixed, cost),
        "value": values[world.start],
        "lost": price * walk(world, mixed, distance),
        "kl": walk(world, mixed, distance),
    }
    found = exactness.slot_world_dera(world)[exactness.key(alpha)]
    assert found == pytest.approx(expected, abs=1e-9)
    loss = expected["value"] - expected["mixed_objective"]
    assert loss == pytest.approx(price * expected["kl"], abs=1e-9)


@pytest.mark.parametrize("same_base", [True, False])
def test_claim_the_map_has_the_mean_gap_of_every_horizon_and_exponent(monkeypatch, same_base):
    """A gap that tells its arguments apart: which base, which untuned model, β and the exponent."""
    monkeypatch.setattr(exactness, "HORIZONS", (1, 3))
    monkeypatch.setattr(exactness, "ALPHAS", (0.25, 2.0))

    def problem(horizon, seed):
        return horizon, 1000.0 * seed, 5.0, 7.0  # tree, reward, the untuned model, another one

    def gap(tree, reward, base, untuned, beta, alpha):
        return reward + 10 * tree + base / untuned + beta + alpha, alpha * reward

    monkeypatch.setattr(exactness, "gap", gap)
    found = exactness.exactness_map(problem, [1, 2, 6], same_base)
    base = 5.0 if same_base else 7.0
    for horizon in (1, 3):
        for alpha, key in ((0.25, "0_25"), (2.0, "2")):
            worst = [1000.0 * s + 10 * horizon + base / 5 + 0.5 + alpha for s in (1, 2, 6)]
            cell = summarise([{"x": x} for x in worst])["x"] | {"kl": alpha * 3000}
            assert found[str(horizon)].pop(key) == pytest.approx(cell)
    assert found == {"1": {}, "3": {}}


def test_claim_the_results_file_has_the_three_maps_and_the_slot_world(monkeypatch):
    monkeypatch.setattr(exactness, "exactness_map", lambda *given, **more: (*given, more))
    monkeypatch.setattr(exactness, "slot_world_dera", lambda world: ("dera", world))
    random, additive = exactness.random_problem, exactness.additive_problem
    assert exactness.run((1, 2)) == {
        "seeds": [1, 2],
        "beta": exactness.BETA,
        "same_base": (random, (1, 2), {"same_base": True}),
        "other_base": (random, (1, 2), {"same_base": False}),
        "additive": (additive, (1, 2), {"same_base": False}),
        "slot_world": ("dera", SlotWorld()),
    }


def test_claim_a_borrowed_advantage_is_exact_where_the_theory_says_so():
    """One token; α = 1 on the same base; α = 0; a reward by position. Else the gap is there."""
    one = exactness.exactness_map(exactness.random_problem, [0, 1], same_base=True)
    for horizon, row in one.items():
        for alpha, cell in row.items():
            exact = horizon == "1" or alpha in ("0", "1")
            assert (cell["most"] < 1e-9) == exact and (abs(cell["kl"]) < 1e-9) == exact
    additive = exactness.exactness_map(exactness.additive_problem, [0, 1], same_base=False)
    assert all(cell["most"] < 1e-9 for row in additive.values() for cell in row.values())
