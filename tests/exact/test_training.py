"""Exact training on trees: DPO, policy gradients, PPO, and what one pair can do.

Ids and tolerances: paper.md §3.1. The independent side is enumeration and autograd.
"""

import itertools
import math

import pytest
import torch

from qlearn import losses
from qlearn.exact import preferences, soft, training
from qlearn.exact.optimise import minimise
from qlearn.exact.tree import Tree

from . import oracle
from .worlds import BETAS, EOS, SEEDS, as_dict, flat, problem, random_policy, small_problem

COMPLETE = oracle.responses(3, 3, EOS)


def enumerated_objective(logits, edges, reward, log_ref, beta):
    """J of softmax policies, a sum over whole responses, in plain torch on {edge: row}."""
    table, total = {}, 0.0
    for s in {s for s, _ in edges}:
        table[s] = logits[[edges[s, a] for a in range(3)]].log_softmax(0)
    for y in COMPLETE:
        logp = sum(table[s][a] for s, a in oracle.steps(y))
        gain = oracle.total(reward, y) - beta * (logp - oracle.total(log_ref, y))
        total = total + logp.exp() * gain
    return total


@pytest.mark.parametrize("beta", BETAS)
def test_eq_02_policy_gradient_is_that_of_the_enumerated_objective(beta):
    """∂J/∂logits = d π A against autograd of the sum over responses. `eq-policy-gradient`"""
    for seed in range(10):
        tree, reward, log_ref = small_problem(seed)
        edges = {e: i for i, e in enumerate(as_dict(tree, reward))}
        policy = random_policy(tree, seed + 3)
        logits = flat(policy).requires_grad_()
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        (slope,) = torch.autograd.grad(enumerated_objective(logits, edges, r, ref, beta), logits)
        got = training.policy_gradient(tree, policy, reward, log_ref, beta)
        assert (flat(got) - slope).abs().max() < 1e-10
        # PPO's loss has the same gradient at the old policy: its weights are d_old π_old.
        start = flat(policy).requires_grad_()
        new = tuple(x.log_softmax(-1) for x in tree.split(start))
        value, q = soft.evaluate(tree, policy, soft.kl_reward(policy, reward, log_ref, beta))
        loss = sum(
            (d[:, None] * p.exp() * losses.ppo_clip(n, p, x - v[:, None], 0.2)).sum()
            for d, p, n, x, v in zip(
                soft.reach(tree, policy), policy, new, q, value, strict=True
            )
        )  # fmt: skip
        assert (-torch.autograd.grad(loss, start)[0] - slope).abs().max() < 1e-10


@pytest.mark.parametrize("beta", BETAS)
def test_eq_02_bandit_gradient_is_that_of_the_arms(beta):
    """π(y)[G − E G] against autograd over arm logits. `eq-bandit-gradient`"""
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        theta, returns, logits = torch.randn(3, 15, generator=generator, dtype=torch.float64)
        ref = logits.log_softmax(0)
        theta.requires_grad_()
        logp = theta.log_softmax(0)
        j = sum(logp[i].exp() * (returns[i] - beta * (logp[i] - ref[i])) for i in range(15))
        (slope,) = torch.autograd.grad(j, theta)
        got = training.bandit_gradient(logp.detach(), returns, ref, beta)
        assert (got - slope).abs().max() < 1e-12


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_eq_03_every_ascent_reaches_the_optimum(beta):
    """Policy gradient, natural gradient and PPO, paid densely or at the end, end at π*.

    `eq-sparse-reward`, `eq-ppo`, `eq-policy-gradient`, `eq-natural-gradient`
    """
    for seed in range(2):
        tree, reward, log_ref = small_problem(seed)
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        best = oracle.soft_value((0,), COMPLETE, r, ref, beta)
        sparse = tree.only_at_end(tree.path_sums(reward))
        for paid in (reward, sparse):
            ascents = {
                "gradient": training.gradient_ascent(tree, paid, log_ref, beta, lr=2.0),
                "natural": training.natural_gradient_ascent(tree, paid, log_ref, beta, 0.5 / beta),
                "ppo": training.ppo(tree, paid, log_ref, beta, lr=1.0, epochs=4),
            }
            for name, steps in ascents.items():
                scores = [
                    soft.objective(tree, logp, reward, log_ref, beta).item()
                    for logp in itertools.islice(steps, 0, 201, 50)
                ]
                assert best - scores[0] > 0.05, name
                assert -1e-12 < best - scores[-1] < 1e-2 * (best - scores[0]), name
                assert all(b > a - 1e-9 for a, b in itertools.pairwise(scores)), name


@pytest.mark.parametrize("beta", BETAS)
def test_claim_natural_gradient_contracts_exactly(beta):
    """log π/π* shrinks by 1 − lr β a step on one level; at lr = 1/β H levels take H steps.

    `eq-natural-gradient`, `thm-natural-gradient`
    """
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        returns, logits = torch.randn(2, 1, 6, generator=generator, dtype=torch.float64)
        ref = logits.log_softmax(-1)
        arms = Tree.full(6, 1, eos=None)
        lr, best = 0.3 / beta, oracle.gibbs(returns[0].tolist(), ref[0].tolist(), beta)
        best = torch.tensor(best, dtype=torch.float64)
        ascent = training.natural_gradient_ascent(arms, (returns,), (ref,), beta, lr)
        for k, (logp,) in enumerate(itertools.islice(ascent, 8)):
            tilt = 0.7**k * (ref[0] - best)
            expected = best + tilt - oracle.log_sum_exp((best + tilt).tolist())
            assert (logp[0] - expected).abs().max() < 1e-11 / beta
        tree, reward, log_ref = small_problem(seed)
        ascent = training.natural_gradient_ascent(tree, reward, log_ref, beta, 1 / beta)
        regrets = [
            soft.regret(tree, p, reward, log_ref, beta).item() for p in itertools.islice(ascent, 4)
        ]
        assert regrets[0] > 1e-6 and abs(regrets[3]) < 1e-10


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_claim_ppo_leaves_a_token_alone_once_it_went_far_enough(advantage):
    """The clip stops only steps that the advantage asked for. `eq-ppo`"""
    for ratio in (0.5, 0.85, 1.0, 1.15, 1.5):
        logp = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
        zero = torch.zeros((), dtype=torch.float64)
        loss = losses.ppo_clip(logp, zero, torch.tensor(advantage, dtype=torch.float64), 0.2)
        (slope,) = torch.autograd.grad(loss, logp)
        far = ratio > 1.2 if advantage > 0 else ratio < 0.8
        assert slope.item() == pytest.approx(0 if far else -ratio * advantage, abs=1e-12)
        kept = min(max(ratio, 0.8), 1.2)
        assert loss.item() == pytest.approx(-min(ratio * advantage, kept * advantage))


def priced_advantages(tree, logp, reward, log_ref, beta):
    """{(t, s, a): (d π(a|s), A)} of r − β log π/π_ref, state by state in plain Python."""
    child, p, r, ref = ([x.tolist() for x in f] for f in (tree.child, logp, reward, log_ref))
    table = {}

    def visit(t, s, chance):
        q = []
        for a, c in enumerate(child[t][s]):
            below = visit(t + 1, c, chance * math.exp(p[t][s][a])) if c >= 0 else 0.0
            q.append(r[t][s][a] - beta * (p[t][s][a] - ref[t][s][a]) + below)
        value = sum(math.exp(x) * y for x, y in zip(p[t][s], q, strict=True))
        for a, x in enumerate(q):
            table[t, s, a] = chance * math.exp(p[t][s][a]), x - value
        return value

    for s in range(len(child[0])):
        visit(0, s, 1.0)
    return table


@pytest.mark.parametrize("clip", [0.05, math.inf])
def test_eq_03_ppo_steps_up_the_clipped_surrogate(clip):
    """Three epochs on Σ d π_old min(ρ A, clip(ρ) A), by autograd, twice; the policies are plain.

    `eq-ppo`
    """
    tree, reward, log_ref = small_problem(4)
    start, lr, beta = random_policy(tree, 9), 0.4, 0.5
    ascent = training.ppo(tree, reward, log_ref, beta, lr, clip, epochs=3, start=start)
    old = next(ascent)
    assert all(x is y for x, y in zip(old, start, strict=True))
    for _ in range(2):
        table = priced_advantages(tree, old, reward, log_ref, beta)
        logits, stopped = list(old), 0
        for _ in range(3):
            logits = [x.detach().requires_grad_() for x in logits]
            gain = 0.0
            for (t, s, a), (weight, advantage) in table.items():
                ratio = logits[t][s].softmax(0)[a] / old[t][s, a].exp()
                stops = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
                stopped += bool(stops)
                gain = gain + weight * advantage * (ratio.detach() if stops else ratio)
            slopes = torch.autograd.grad(gain, logits)
            logits = [x + lr * g for x, g in zip(logits, slopes, strict=True)]
        new = next(ascent)
        for x, y in zip(new, logits, strict=True):
            assert (x - y.log_softmax(-1)).abs().max() < 1e-12 and not x.requires_grad
        assert (stopped > 0) == (clip < 1)
        old = new


def test_claim_one_epoch_of_ppo_is_a_step_of_the_policy_gradient():
    """At π = π_old the surrogate's slope is ∂J/∂logits, whatever the clip."""
    for seed in SEEDS[:5]:
        tree, reward, log_ref = small_problem(seed, n_prompts=2)
        start = random_policy(tree, 60 + seed)
        ascents = (
            training.ppo(tree, reward, log_ref, 0.5, 0.3, epochs=1, start=start),
            training.gradient_ascent(tree, reward, log_ref, 0.5, 0.3, start=start),
        )
        one, two = ([next(x) for _ in range(3)] for x in ascents)
        for x, y in zip(one, two, strict=True):
            assert (flat(x) - flat(y)).abs().max() < 1e-12


@pytest.mark.parametrize("beta", BETAS)
def test_eq_09_population_dpo_with_two_prompts(beta):
    """D2 by the library's own trainer: two prompts, from random logits, KL(π* ‖ π) < 1e-8.

    `thm-dpo-optimum`, `eq-population-loss`
    """
    for seed in range(5):
        tree, reward, log_ref = small_problem(seed, n_prompts=2)
        start = random_policy(tree, seed + 70)
        fitted = training.train_dpo(tree, tree.path_sums(reward), log_ref, beta, start)
        r, ref, p = (as_dict(tree, x) for x in (reward, log_ref, fitted))
        for prompt in (0, 1):
            complete = oracle.responses(3, 3, EOS, prompt)
            best = oracle.gibbs(
                [oracle.total(r, y) for y in complete],
                [oracle.total(ref, y) for y in complete],
                beta,
            )
            kl = math.fsum(
                math.exp(b) * (b - oracle.total(p, y)) for b, y in zip(best, complete, strict=True)
            )
            assert kl < 1e-8


@pytest.mark.parametrize("beta", BETAS)
def test_claim_one_step_is_a_map_of_surprise(beta):
    """D4: after one step from the reference, Δlog π = ±η g ‖e − π_ref‖² after the fork.

    At the fork the winner's token gains η g (1 − π_w + π_l). g = β/2. `eq-one-step-map`
    """
    winner, loser, eta = (0, 1, 2, 1), (0, 1, 1, 2), 1e-4
    for seed in SEEDS:
        tree, _, log_ref = small_problem(seed)
        leaves, theta = tree.leaves(), flat(log_ref).requires_grad_()
        logp = tree.path_sums(tuple(x.log_softmax(-1) for x in tree.split(theta)))
        ref = tree.path_sums(log_ref)
        first, second = leaves.index(winner), leaves.index(loser)
        loss = losses.dpo(*logp[[first, second]], *ref[[first, second]], beta).loss
        (slope,) = torch.autograd.grad(loss, theta)
        stepped = tuple(x.log_softmax(-1) for x in tree.split((theta - eta * slope).detach()))
        before, after = as_dict(tree, log_ref), as_dict(tree, stepped)
        moved = {e: after[e] - before[e] for e in before}
        p = {e: math.exp(x) for e, x in before.items()}
        g = beta / 2
        fork = (0, 1)
        assert abs(moved[(0,), 1]) < 1e-14
        expected = eta * g * (1 - p[fork, 2] + p[fork, 1])
        assert moved[fork, 2] == pytest.approx(expected, rel=1e-3)
        for y, sign in ((winner, 1), (loser, -1)):
            s, a = y[:3], y[3]
            distance = sum((float(b == a) - p[s, b]) ** 2 for b in range(3))
            assert moved[s, a] == pytest.approx(sign * eta * g * distance, rel=1e-3)


def test_claim_uncovered_responses_are_free():
    """D5: responses that no pair shows: equal loss to 1e-12, off-data mass 0.1 and more apart."""
    for seed in SEEDS:
        tree, reward, log_ref = small_problem(seed)
        leaves = tree.leaves()
        shown = [i for i, y in enumerate(leaves) if y[1] != 2]
        r, q = as_dict(tree, reward), as_dict(tree, log_ref)
        returns, ref = ([oracle.total(x, leaves[i]) for i in shown] for x in (r, q))
        best = oracle.gibbs(returns, ref, 0.5)
        losses_found = []
        for p_off in (0.1, 0.8):
            # π* of the shown responses alone, scaled down; what is off the data has mass p_off
            logp = torch.tensor([x + math.log(1 - p_off) for x in best], dtype=torch.float64)
            implied = soft.implicit_reward(logp, torch.tensor(ref, dtype=torch.float64), 0.5)
            true = tree.path_sums(reward)[shown]
            losses_found.append(preferences.population_loss(implied, true).item())
        odds = [oracle.sigmoid(a - b) for a, b in itertools.permutations(returns, 2)]
        entropy = -2 * math.fsum(p * math.log(p) for p in odds) / len(odds)
        assert all(abs(x - entropy) < 1e-12 for x in losses_found)
        worse = preferences.population_loss(1.1 * implied, true).item()
        assert worse > entropy + 1e-6  # the loss does see what the pairs show


@pytest.mark.parametrize("beta", BETAS)
def test_claim_certain_labels_have_no_optimum(beta):
    """D6: labels that are always right: the loss falls, the margin grows, and never stops."""
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        theta, logits = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        ref = logits.log_softmax(0)
        margins = []
        for _ in range(60):
            theta = theta.detach().requires_grad_()
            logp = theta.log_softmax(0)
            out = losses.dpo(logp[0], logp[1], ref[0], ref[1], beta)
            (slope,) = torch.autograd.grad(out.loss, theta)
            theta = theta - slope / beta**2
            margins.append((out.chosen_reward - out.rejected_reward).item())
        assert all(b > a for a, b in itertools.pairwise(margins)) and margins[-1] > 3


def test_eq_01_maximum_likelihood_recovers_returns():
    """Exact vote shares give the returns back; counts give the fixed point of Hunter's MM.

    `eq-reward-model`
    """
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        returns = torch.randn(6, generator=generator, dtype=torch.float64)
        shares = 1 / (1 + (returns[None, :] - returns[:, None]).exp())
        fitted = preferences.fit_returns(shares.fill_diagonal_(0))
        assert (fitted - (returns - returns.mean())).abs().max() < 1e-6
        wins = torch.randint(1, 9, (6, 6), generator=generator).double().fill_diagonal_(0)
        if seed < 2:
            strength = [1.0] * 6
            for _ in range(2000):
                strength = [_one_mm_step(i, strength, wins.tolist()) for i in range(6)]
            logs = torch.tensor([math.log(x) for x in strength], dtype=torch.float64)
            got = preferences.fit_returns(wins)
            assert (got - (logs - logs.mean())).abs().max() < 1e-6


def _one_mm_step(i, strength, wins):
    """Hunter (2004): victories over Σ_j games_ij / (strength_i + strength_j)."""
    games = sum(
        (wins[i][j] + wins[j][i]) / (strength[i] + strength[j]) for j in range(len(wins)) if j != i
    )
    return sum(wins[i]) / games


def test_claim_votes_are_counted_and_bad_ones_named():
    tree, _, _ = problem(0, n_prompts=2)
    n = len(tree.leaves())
    prompts = tree.prompt_of().tolist()
    assert prompts == [y[0] for y in tree.leaves()]
    i, j = [k for k, prompt in enumerate(prompts) if prompt == 0][:2]
    wins = preferences.count_wins(tree, torch.tensor([i, i, j]), torch.tensor([j, j, i]))
    assert wins[i, j] == 2 and wins[j, i] == 1 and wins.sum() == 3
    other = prompts.index(1)
    with pytest.raises(ValueError, match="Pair 1 compares answers to different prompts, 0 and 1"):
        preferences.count_wins(tree, torch.tensor([i, i]), torch.tensor([j, other]))
    with pytest.raises(ValueError, match=rf"losers\[0\] is {n}; there are {n} responses"):
        preferences.count_wins(tree, torch.tensor([0]), torch.tensor([n]))
    never = torch.tensor([[0.0, 3.0, 1.0], [0.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    with pytest.raises(
        ValueError, match="No chain of victories leads from response 1 to response 0"
    ):
        preferences.fit_returns(never)


@pytest.mark.parametrize("beta", BETAS)
def test_eq_09_population_loss_of_a_policy_is_the_sum_over_prompts(beta):
    """`dpo_loss` by a double loop over each prompt's responses. `eq-population-loss`"""
    tree, reward, log_ref = small_problem(3, n_prompts=2)
    policy = random_policy(tree, 8)
    r, ref, p = (as_dict(tree, x) for x in (reward, log_ref, policy))
    expected = 0.0
    for prompt in (0, 1):
        complete = oracle.responses(3, 3, EOS, prompt)
        score = {y: beta * (oracle.total(p, y) - oracle.total(ref, y)) for y in complete}
        true = {y: oracle.total(r, y) for y in complete}
        pairs = list(itertools.permutations(complete, 2))
        expected -= math.fsum(
            oracle.sigmoid(true[a] - true[b]) * math.log(oracle.sigmoid(score[a] - score[b]))
            for a, b in pairs
        ) / (len(pairs) / 2)
    got = training.dpo_loss(tree, policy, tree.path_sums(reward), log_ref, beta)
    assert got.item() == pytest.approx(expected, abs=1e-10)


def test_claim_minimise_finds_the_minimum_or_says_that_there_is_none():
    target = torch.tensor([1.0, -2.0], dtype=torch.float64)
    for start in (torch.zeros(2, dtype=torch.float64), 0 * target.clone().requires_grad_()):
        found = minimise(lambda x: ((x - target) ** 2).sum(), start)
        assert (found - target).abs().max() < 1e-9 and not found.requires_grad
    with pytest.raises(ValueError, match="stops being finite"):
        minimise(lambda x: (x * math.inf).sum(), torch.ones(2, dtype=torch.float64))
