"""What the theorems need and what they do not: each condition with the case that shows it."""

import math
from itertools import islice, pairwise

import pytest
import torch

from qlearn import losses
from qlearn.exact import search, soft, training
from qlearn.exact.optimise import minimise
from qlearn.exact.tree import Tree

from . import oracle
from .worlds import EOS, as_dict, flat, random_policy, small_problem


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_claim_without_a_limit_of_length_a_reward_has_many_q_or_none(beta):
    """u_t = ρ u_{t+1} + c has a line of positive solutions for ρ < 1 and none for ρ ≥ 1.

    On an endless chain s_0, s_1, ... of unlike states: no loop, and yet no bijection. C is the
    chance never to end: by the product of probabilities. A limit of length leaves C = 0 as the only
    table, up to what the limit cuts off. `eq-endless`
    """
    p, stay, leave = 0.8, -0.1, 0.4
    rho, c = p * math.exp(stay / beta), (1 - p) * math.exp(leave / beta)
    assert rho < 1
    log_ref = torch.tensor([p, 1 - p], dtype=torch.float64).log()
    fixed = c / (1 - rho)
    for extra in (0.0, 0.7, 5.0):
        value = [beta * math.log(fixed + extra * rho**-t) for t in range(400)]
        log_never = 0.0
        for here, after in pairwise(value):
            q = torch.tensor([stay + after, leave], dtype=torch.float64)
            assert abs(soft.soft_value_prior(q, log_ref, beta).item() - here) < 1e-8
            log_never += math.log(p) + (stay + after - here) / beta
        assert math.exp(log_never) == pytest.approx(extra / (fixed + extra), abs=1e-8)
    for steep in (1.0, 1.2):  # ρ ≥ 1: whatever it starts with, u is used up
        for u in (1.0, 1e3):
            positive = [u]
            while positive[-1] > 0 and len(positive) < 100_000:
                positive.append((positive[-1] - c) / steep)
            assert positive[-1] <= 0
    depth = 400
    chain = Tree.from_graph(
        {t: [t + 1 if t + 1 < depth else None, None] for t in range(depth)}, [0]
    )[0]
    reward = tuple(torch.tensor([[stay, leave]], dtype=torch.float64) for _ in range(depth))
    best = soft.soft_backup(chain, reward, (log_ref[None],) * depth, beta)
    assert best.value[0].item() == pytest.approx(beta * math.log(fixed), abs=1e-6)


def test_claim_infinite_choices_are_scored_in_one_sum():
    """V is finite and p* exists, though E_{p*} q and the price are both infinite: `thm-one-choice`.

    π_ref(k) ∝ e^(−k)/(k log² k) and q(k) = βk. Action by action q − β log(p*/π_ref) is V.
    """
    beta = 0.5
    k = torch.arange(2, 1_000_002, dtype=torch.float64)
    log_ref = (-k - k.log() - 2 * k.log().log()).log_softmax(0)
    value = soft.soft_value_prior(beta * k, log_ref, beta).item()
    logp = log_ref + (beta * k - value) / beta
    earned = (logp.exp() * beta * k).cumsum(0)
    assert earned[-1] > 5 * earned[99_999] > 25 * earned[9_999]  # it has no limit
    each = beta * k - beta * (logp - log_ref)
    assert (each - value).abs().max() < 1e-6
    # An action that the reference never takes: −∞ = −∞ for a policy that takes it.
    ref = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    q = torch.tensor([1.0, 0.0, 9.0], dtype=torch.float64)
    v = soft.soft_value_prior(q, ref.log(), beta)
    best = ref * ((q - v) / beta).exp()
    p = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    assert (p * q).sum() - beta * (p * (p / ref).log()).sum() == -math.inf
    assert v - beta * (p * (p / best).log()).sum() == -math.inf and best[2] == 0


def test_claim_leaving_out_costs_little_and_a_bad_habit_much():
    """Least regret of leaving out mass m: β log 1/(1−m); of writing y half the time: its formula.

    Both are found by minimising the regret over policies, which know of no formula. `eq-regret`
    """
    beta = 0.7
    for seed in range(5):
        tree, reward, log_ref = small_problem(seed)
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        complete = oracle.responses(3, 3, EOS)
        returns = torch.tensor([oracle.total(r, y) for y in complete], dtype=torch.float64)
        prior = torch.tensor([oracle.total(ref, y) for y in complete], dtype=torch.float64)
        star = (prior + returns / beta).softmax(0)
        value = beta * (prior + returns / beta).logsumexp(0)

        def regret(logp, kept, prior=prior, returns=returns, value=value):
            gain = returns[kept] - beta * (logp - prior[kept])
            return value - (logp.exp() * gain).sum()

        kept = torch.arange(15) >= 6
        start = torch.zeros(9, dtype=torch.float64)
        rest = minimise(lambda x, k=kept, f=regret: f(x.log_softmax(0), k), start)
        least = regret(rest.log_softmax(0), kept).item()
        assert least == pytest.approx(-beta * math.log(star[kept].sum()), abs=1e-8)

        def habit(x):
            others = x.log_softmax(0) + math.log(0.5)
            return torch.cat([torch.tensor([math.log(0.5)], dtype=torch.float64), others])

        everyone = torch.ones(15, dtype=torch.bool)
        start = torch.zeros(14, dtype=torch.float64)
        best = minimise(lambda x, f=regret, h=habit, k=everyone: f(h(x), k), start)
        least = regret(habit(best), everyone).item()
        p = star[0].item()
        assert least == pytest.approx(-beta / 2 * math.log(4 * p * (1 - p)), abs=1e-8)


@pytest.mark.parametrize("n", [2, 5, 12, 30])
def test_claim_no_judge_lifts_the_chosen_rewards_to_the_ceiling(n):
    """KL(p_w ‖ π_ref) < log 2 − ½ for every judge and reference; as n grows the best come near.

    An optimiser chooses the odds of every pair and the reference together, from random starts. By
    hand: equal answers and a judge who never errs. `eq-chosen-ceiling`
    """
    ceiling = math.log(2) - 0.5
    rows, columns = torch.triu_indices(n, n, offset=1)

    def divergence(x):
        odds = torch.zeros(n, n, dtype=torch.float64)
        odds = odds.index_put((rows, columns), x[n:])
        win = (odds - odds.T).sigmoid()  # a draw of the same answer twice counts half
        prior = x[:n].softmax(0)
        w = 2 * win @ prior
        return (prior * torch.xlogy(w, w)).sum()

    by_hand = math.fsum((2 * k - 1) / n**2 * math.log((2 * k - 1) / n) for k in range(1, n + 1))
    best = 0.0
    for seed in range(3):
        dice = torch.Generator().manual_seed(seed)
        start = 0.3 * torch.randn(n + len(rows), generator=dice, dtype=torch.float64)
        x = minimise(lambda x: -divergence(x) + 1e-9 * (x**2).sum(), start, max_iter=1000)
        best = max(best, divergence(x).item())
        for scale in (0.3, 3.0, 100.0):  # and no random judge either
            assert divergence(scale * start) < ceiling
    assert by_hand < ceiling and best < ceiling
    assert max(best, by_hand) > ceiling - 0.5 / n
    assert n > 5 or best > by_hand  # unequal answers serve a judge better


def test_claim_policy_and_judge_together_stay_below_the_ceiling():
    """The mean log-ratio of chosen answers is at most KL(p_w ‖ π_ref), and equal at π = p_w.

    `eq-chosen-ceiling`
    """
    for seed in range(20):
        tree, reward, log_ref = small_problem(seed)
        prior, returns = tree.path_sums(log_ref), 20 * tree.path_sums(reward)
        win = (returns[:, None] - returns).sigmoid()
        p_w = 2 * prior.exp() * (win @ prior.exp())
        most = (p_w * (p_w.log() - prior)).sum()
        assert 0 < most < math.log(2) - 0.5
        for policy in (tree.path_sums(random_policy(tree, seed)), p_w.log()):
            mean = (p_w * (policy - prior)).sum()
            assert mean < most + 1e-12
        assert abs(mean - most) < 1e-12


@pytest.mark.parametrize(("clip", "epochs"), [(0.05, 1), (0.2, 4), (0.2, 30), (math.inf, 30)])
def test_claim_ppo_rests_at_the_optimum_and_short_inner_steps_leave_any_other_policy(clip, epochs):
    """At π* nothing moves, for any clip and number of steps; elsewhere short steps only climb.

    The surrogate is 0 at the old policy and, after the iteration, above it: so the policy is
    another one. `eq-ppo`
    """
    beta = 0.5
    for seed in range(5):
        tree, reward, log_ref = small_problem(seed)
        best = soft.soft_backup(tree, reward, log_ref, beta).logp
        run = training.ppo(tree, reward, log_ref, beta, 1.0, clip, epochs, start=best)
        assert (flat(list(islice(run, 3))[-1]) - flat(best)).abs().max() < 1e-9
        some = random_policy(tree, seed)
        paid = soft.kl_reward(some, reward, log_ref, beta)
        value, q = soft.evaluate(tree, some, paid)
        heights = []
        for count in range(1, epochs + 1):
            run = training.ppo(tree, reward, log_ref, beta, 0.1, clip, count, start=some)
            new = list(islice(run, 2))[1]
            levels = zip(soft.reach(tree, some), new, some, q, value, strict=True)
            heights.append(-sum(
                (d[:, None] * o.exp() * losses.ppo_clip(p, o, a - v[:, None], clip)).sum().item()
                for d, p, o, a, v in levels
            ))  # fmt: skip
        assert heights[0] > 1e-12
        assert all(y > x - 1e-9 for x, y in pairwise(heights))


def test_claim_a_natural_step_mixes_the_old_policy_with_the_best_reply():
    """log π_{k+1} = (1 − ηβ) log π_k + ηβ log π⁺ + c, on three levels and any η.

    π⁺ is the single best choice against V^π of the states below, by hand. `thm-natural-gradient`
    """
    beta, lr = 0.4, 0.9
    for seed in range(10):
        tree, reward, log_ref = small_problem(seed)
        old = random_policy(tree, seed)
        run = training.natural_gradient_ascent(tree, reward, log_ref, beta, lr, start=old)
        new = list(islice(run, 2))[1]
        paid = soft.kl_reward(old, reward, log_ref, beta)
        value, _ = soft.evaluate(tree, old, paid)
        for t in range(tree.horizon):
            below = value[t + 1] if t + 1 < tree.horizon else None
            reply = log_ref[t] + (reward[t] + tree.next_value(t, below)) / beta
            mixed = ((1 - lr * beta) * old[t] + lr * beta * reply).log_softmax(-1)
            assert (new[t] - mixed).abs().max() < 1e-10


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_claim_a_critic_may_err_where_no_token_hears_of_it(lam):
    """Below λ = 1 the critic need not be right: errors that are one number a depth do no harm.

    Answers of one length; the critic is V^π plus a number for each depth. The expected update, by
    enumeration with `losses.gae`, is the exact gradient. An error in one state of depth 1 bends it
    unless λ = 1. `eq-gae`
    """
    tree = Tree.full(3, 3, eos=None)
    generator = torch.Generator().manual_seed(3)
    reward = tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in tree.shapes)
    logits = tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in tree.shapes)
    policy = tuple(x.log_softmax(-1) for x in logits)
    value, _ = soft.evaluate(tree, policy, reward)
    exact = training.policy_gradient(tree, policy, reward, policy, 1.0)  # no price at π = π_ref

    def update(critic):
        p, r = as_dict(tree, policy), as_dict(tree, reward)
        states = {s: (t, i) for t, level in enumerate(tree.prefixes()) for i, s in enumerate(level)}
        slope = [torch.zeros_like(x) for x in policy]
        for y in tree.leaves():
            pairs = oracle.steps(y)
            pay = torch.tensor([[r[e] for e in pairs]], dtype=torch.float64)
            v = torch.tensor([[critic[states[s][0]][states[s][1]] for s, _ in pairs]]).double()
            advantage, _ = losses.gae(pay, v, torch.ones(1, 3), lam=lam)
            for (s, a), x in zip(pairs, advantage[0], strict=True):
                t, i = states[s]
                step = -policy[t][i].exp()
                step[a] += 1
                slope[t][i] += math.exp(oracle.total(p, y)) * x * step
        return slope

    def off(critic):
        return max((x - y).abs().max() for x, y in zip(update(critic), exact, strict=True)).item()

    assert off(value) < 1e-6
    assert off(tuple(v + 2 - t for t, v in enumerate(value))) < 1e-6
    bent = tuple(v.clone() for v in value)
    bent[1][0] += 1.0
    assert off(bent) < 1e-6 if lam == 1.0 else off(bent) > 1e-3


def test_claim_width_1_is_greedy_and_keeps_no_record():
    """One place in the beam holds one text: the greedy one, whatever the length penalty."""
    for seed in range(30):
        tree, _, _ = small_problem(seed)
        logp = random_policy(tree, seed)
        table, s = as_dict(tree, logp), (0,)
        while len(s) == 1 or (s[-1] != EOS and len(s) < 4):
            s = (*s, max(range(3), key=lambda a, s=s: table[s, a]))
        for penalty in (0.0, 1.0, 3.0):
            assert search.beam(tree, logp, width=1, length_penalty=penalty)[0] == s
