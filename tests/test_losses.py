"""The DPO loss: both derivations, its population optimum, its gradient on a tree (D1 to D3)."""

import math

import pytest
import torch

from qlearn import losses
from qlearn.exact import soft
from qlearn.exact.preferences import population_loss

from .exact import oracle
from .exact.worlds import BETAS, EOS, HORIZON, N_ACTIONS, SEEDS, as_dict, problem, random_field

COMPLETE = oracle.responses(N_ACTIONS, HORIZON, EOS)


def leaf_logp(tree, logits):
    """log π(y) of every response from the tables of logits: (L,)."""
    return tree.path_sums(tuple(x.log_softmax(-1) for x in logits))


@pytest.mark.parametrize("beta", BETAS)
def test_eq_04_and_eq_09_are_one_loss(beta):
    """D1: the bandit loss and the token loss agree in value and in gradient. `thm-one-loss`

    The bandit side multiplies probabilities of whole responses, the token side adds the log-ratios
    of tokens (Eq. 8); each is differentiated by autograd with respect to all logits. `eq-dpo-loss`
    """
    steepest = 0.0
    for seed in SEEDS:
        tree, _, log_ref = problem(seed)
        flat = torch.cat([x.flatten() for x in random_field(tree, 50 + seed)]).requires_grad_()
        leaves = tree.leaves()
        win, lose = leaves[(7 * seed) % len(leaves)], leaves[(7 * seed + 5) % len(leaves)]
        logits, ref = tree.split(flat), as_dict(tree, log_ref)
        index = {p: (t, s) for t, ps in enumerate(tree.prefixes()) for s, p in enumerate(ps)}

        def table(prefix, logits=logits, index=index):
            t, s = index[prefix]
            return logits[t][s]

        def bandit(y):
            p = torch.ones((), dtype=torch.float64)
            for s, a in oracle.steps(y):
                p = p * torch.softmax(table(s), 0)[a]
            return p

        ratio = [bandit(y) / math.exp(oracle.total(ref, y)) for y in (win, lose)]
        by_bandit = torch.log1p((ratio[1] / ratio[0]) ** beta)
        by_token = losses.dpo(
            *(sum(table(s).log_softmax(0)[a] for s, a in oracle.steps(y)) for y in (win, lose)),
            *(torch.tensor(oracle.total(ref, y), dtype=torch.float64) for y in (win, lose)),
            beta,
        ).loss
        assert abs(by_bandit - by_token) < 1e-12
        one, two = (
            torch.autograd.grad(x, flat, retain_graph=True)[0] for x in (by_bandit, by_token)
        )
        assert (one - two).abs().max() < 1e-12
        steepest = max(steepest, one.abs().max().item())
    assert steepest > beta / 4  # the comparison was not one of zeros


def fit_population_dpo(tree, returns, log_ref, beta, seed):
    """Minimises the exact DPO loss by L-BFGS from random logits; returns log π(y): (L,)."""
    ref = tree.path_sums(log_ref)
    flat = torch.cat([x.flatten() for x in random_field(tree, seed)]).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [flat],
        max_iter=5000,
        max_eval=20_000,
        history_size=100,
        tolerance_grad=1e-9,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimiser.zero_grad()
        implied = soft.implicit_reward(leaf_logp(tree, tree.split(flat)), ref, beta)
        loss = population_loss(implied, returns) / beta**2  # curvature of order 1 at every β
        loss.backward()
        return loss

    optimiser.step(closure)
    return leaf_logp(tree, tree.split(flat.detach()))


@pytest.mark.parametrize(("k", "beta"), list(enumerate(BETAS)))
def test_claim_population_dpo_recovers_the_optimal_policy(k, beta):
    """D2: L-BFGS on the exact loss over all pairs, from random logits: KL(π* ‖ π) < 1e-8.

    50 random problems, ten at each β: a fit takes a quarter of a second.
    """
    for seed in SEEDS[k :: len(BETAS)]:
        tree, reward, log_ref = problem(seed)
        returns = tree.path_sums(reward)
        logp = fit_population_dpo(tree, returns, log_ref, beta, seed=400 + seed)
        best = (tree.path_sums(log_ref) + returns / beta).log_softmax(0)
        assert (best.exp() * (best - logp)).sum() < 1e-8


def test_claim_gradient_is_zero_before_the_fork():
    """D3: 0 on the shared prefix, e_w − e_l at the fork, then ±(e_a − π), times βσ(−margin).

    `eq-pair-gradient`
    """
    beta = 0.3
    for seed in SEEDS:
        tree, _, log_ref = problem(seed)
        flat = torch.cat([x.flatten() for x in random_field(tree, 80 + seed)]).requires_grad_()
        ref = as_dict(tree, log_ref)
        win, lose = (0, 1, 2, 3, 1), (0, 1, 3, 1, 2)  # one shared token, then they part
        leaves = tree.leaves()
        sums = leaf_logp(tree, tree.split(flat))
        pair = [sums[leaves.index(y)] for y in (win, lose)]
        ref_pair = [torch.tensor(oracle.total(ref, y), dtype=torch.float64) for y in (win, lose)]
        out = losses.dpo(*pair, *ref_pair, beta)
        gradient = tree.split(torch.autograd.grad(out.loss, flat)[0])
        margin = (out.chosen_reward - out.rejected_reward).item()
        g = beta / (1 + math.exp(margin))
        probabilities = [x.softmax(-1) for x in tree.split(flat.detach())]
        rows = {
            p: (gradient[t][s], probabilities[t][s])
            for t, ps in enumerate(tree.prefixes())
            for s, p in enumerate(ps)
        }
        assert rows[(0,)][0].abs().max() < 1e-14
        fork = torch.zeros(N_ACTIONS, dtype=torch.float64)
        fork[2], fork[3] = -g, g
        assert (rows[0, 1][0] - fork).abs().max() < 1e-12
        for y, sign in ((win, -1.0), (lose, 1.0)):
            for s, a in oracle.steps(y, start=3):
                slope, p = rows[s]
                expected = -p.clone()
                expected[a] += 1
                assert (slope - sign * g * expected).abs().max() < 1e-12


def test_claim_loss_starts_at_ln_2_whatever_beta():
    """Policy and reference alike: loss ln 2, rewards 0."""
    same = torch.tensor([-3.0, -40.0])
    out = losses.dpo(same, same * 2, same, same * 2, beta=0.7)
    assert torch.allclose(out.loss, torch.tensor(2.0).log().expand(2))
    assert not out.chosen_reward.any() and not out.rejected_reward.any()
    moving = same.clone().requires_grad_()
    out = losses.dpo(moving, 2 * moving, same, same, beta=0.7)
    assert out.loss.requires_grad
    assert not out.chosen_reward.requires_grad and not out.rejected_reward.requires_grad


def test_claim_nll_is_a_token_mean():
    """Rows of unequal length weigh by their tokens, and padding weighs nothing. `eq-sft`"""
    logp = torch.tensor([[-1.0, -2.0, -3.0], [-5.0, 99.0, 99.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert losses.nll(logp, mask).item() == pytest.approx(11 / 4)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_reference_gae_is_the_double_sum(gamma, lam):
    """Against Σ_k (γλ)^k δ_{t+k} written out, on rows of unequal lengths. `eq-gae`"""
    generator = torch.Generator().manual_seed(0)
    reward, value = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    lengths = [7, 1, 4, 6, 2]
    mask = torch.tensor([[t < n for t in range(7)] for n in lengths]).long()
    advantage, target = losses.gae(reward, value, mask, gamma, lam)
    for b, n in enumerate(lengths):
        values = [*value[b, :n].tolist(), 0.0]
        for t in range(7):
            expected = sum(
                (gamma * lam) ** k
                * (reward[b, t + k].item() + gamma * values[t + k + 1] - values[t + k])
                for k in range(max(n - t, 0))
            )
            assert advantage[b, t].item() == pytest.approx(expected, abs=1e-12)
            back = expected + values[t] if t < n else 0.0
            assert target[b, t].item() == pytest.approx(back, abs=1e-12)


def test_claim_gae_with_lambda_1_is_the_return_less_the_value():
    """Whatever the values are, so a poor value head costs noise and no bias; not so at λ < 1."""
    generator = torch.Generator().manual_seed(1)
    reward, value = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    mask = torch.ones(3, 6)
    to_go = reward.flip(1).cumsum(1).flip(1)
    advantage, target = losses.gae(reward, value, mask, lam=1.0)
    assert torch.allclose(target, to_go) and torch.allclose(advantage, to_go - value)
    assert (losses.gae(reward, value, mask, lam=0.95)[1] - to_go).abs().max() > 0.01


def test_claim_leave_one_out_is_the_mean_of_the_others():
    """Each return less the mean of its siblings, by hand."""
    returns = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    expected = [[1 - 4.0, 2 - 3.5, 6 - 1.5], [-1.5, -1.5, 3.0]]
    assert torch.allclose(losses.leave_one_out(returns), torch.tensor(expected))


def test_claim_value_loss_stops_pushing_past_the_clip():
    """½(V − G)² near the old value; beyond the clip towards G no gradient; away from G it stays.

    `eq-value-loss`
    """
    value = torch.tensor([0.1, 0.5, -0.5], requires_grad=True)
    loss = losses.value_clip(value, torch.zeros(3), torch.ones(3), clip=0.2)
    assert loss.tolist() == pytest.approx([0.9**2 / 2, 0.8**2 / 2, 1.5**2 / 2])
    assert torch.autograd.grad(loss.sum(), value)[0].tolist() == pytest.approx([-0.9, 0, -1.5])


def test_claim_value_loss_clips_around_the_old_value_on_both_sides():
    """Old value 2: 2.1 stays, 1.5 counts as 1.8 and 2.6 as 2.2, whichever loss is larger."""
    value, old = torch.tensor([2.1, 1.5, 2.6]), torch.full((3,), 2.0)
    below = losses.value_clip(value, old, torch.zeros(3), clip=0.2)
    above = losses.value_clip(value, old, torch.full((3,), 4.0), clip=0.2)
    assert below.tolist() == pytest.approx([2.1**2 / 2, 1.8**2 / 2, 2.6**2 / 2])
    assert above.tolist() == pytest.approx([1.9**2 / 2, 2.5**2 / 2, 1.8**2 / 2])


def test_claim_whitening_is_over_the_mask_alone():
    x = torch.tensor([[1.0, 2.0, 99.0], [3.0, 6.0, 7.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    white = losses.whiten(x, mask)
    kept = white[mask.bool()]
    assert white[0, 2] == 0 and abs(kept.mean()) < 1e-6
    assert (kept**2).mean().item() == pytest.approx(1, abs=1e-5)
    ratio = (white[1, 2] - white[0, 0]) / (white[0, 1] - white[0, 0])
    assert ratio.item() == pytest.approx(6, abs=1e-4)
    assert losses.whiten(torch.full((1, 3), 4.0), torch.ones(1, 3)).tolist() == [[0.0] * 3]


def test_claim_whitening_does_not_blow_up_noise():
    """± d becomes ± d/(d + 10⁻⁸): a half where the deviation is 10⁻⁸, nearly 1 where it is 1."""
    for d in (1e-8, 3e-8, 1e-3, 1.0):
        x = torch.tensor([[-d, d]], dtype=torch.float64)
        white = losses.whiten(x, torch.ones(1, 2))
        assert white[0].tolist() == pytest.approx([-d / (d + 1e-8), d / (d + 1e-8)], rel=1e-6)


def test_claim_an_endless_clip_is_no_clip():
    """ε = ∞: ½ (V − G)² however far V has moved, and −ρ A whatever the ratio. `eq-value-loss`"""
    value, old, target = (torch.tensor(x) for x in ([5.0, -7.0], [0.0, 1.0], [1.0, 2.0]))
    loss = losses.value_clip(value, old, target, clip=math.inf)
    assert loss.tolist() == [4**2 / 2, 9**2 / 2]
    logp = torch.tensor([4.0, -4.0])
    loss = losses.ppo_clip(logp, torch.zeros(2), torch.tensor([2.0, -3.0]), clip=math.inf)
    assert loss.tolist() == pytest.approx([-2 * math.exp(4), 3 * math.exp(-4)])
