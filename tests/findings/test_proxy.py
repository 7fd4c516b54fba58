"""Borrowed advantages: the mixture of language models, and how far it is from its aim."""

import pytest
import torch

from qlearn.exact import soft
from qlearn.findings import proxy
from qlearn.lm.cursor import Cursor
from qlearn.lm.models import load_model
from qlearn.studies import exactness


def test_eq_14_one_formula_for_eft_proxy_tuning_and_dera(model, other, tokenizer):
    """Per token, from logits: `eq-borrowed`; α = 0 is the base, DeRa's α = 1 the tuned model."""
    base = load_model("tiny", tokenizer, seed=3)
    prompts = [[5, 6, 7], [9]]

    def logp(policy):
        return Cursor(policy, prompts, len(tokenizer)).logp

    lent = logp(model) - logp(other)
    for alpha in (0.0, 0.5, 2.0):
        expected = (logp(base) + alpha * lent).log_softmax(-1)
        assert torch.allclose(logp(proxy.tilted(base, model, other, alpha)), expected, atol=1e-4)
    assert torch.allclose(logp(proxy.tilted(base, model, other, 0.0)), logp(base), atol=1e-4)
    dera = proxy.tilted(other, model, other, 1.0)
    assert len(dera.models) == 2 and torch.allclose(logp(dera), logp(model), atol=1e-4)
    for alpha in (0.0, 0.5, 2.0):  # two passes, the same formula
        expected = (logp(other) + alpha * lent).log_softmax(-1)
        assert torch.allclose(logp(proxy.tilted(other, model, other, alpha)), expected, atol=1e-4)


def test_claim_a_padded_table_is_lawful(model, other, tokenizer):
    """A base with 50,304 rows beside a pair with 224: rows that no token names have no say."""
    wide = load_model("random:pythia-14m", tokenizer)
    prompts = tokenizer(["POST: I am a nurse.", "TL;DR:"]).input_ids
    logp = [Cursor(m, prompts, len(tokenizer)).logp for m in (wide, model, other)]
    mixed = Cursor(proxy.tilted(wide, model, other, 1.0), prompts, len(tokenizer)).logp
    expected = (logp[0] + logp[1] - logp[2]).log_softmax(-1)
    assert mixed.shape == (2, len(tokenizer)) and torch.allclose(mixed, expected, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_claim_the_gap_is_nought_where_theory_says_so_and_only_there(alpha):
    """G1, G2: same base with α in {0, 1}, or one token, or the additive world (E3).

    The corners of `thm-when-exact`.
    """
    for seed in range(5):
        tree, reward, untuned, other = exactness.random_problem(3, seed)
        same = proxy.gap(tree, reward, untuned, untuned, 0.5, alpha)[0]
        apart = proxy.gap(tree, reward, other, untuned, 0.5, alpha)[0]
        assert same < 1e-12 if alpha in (0.0, 1.0) else same > 1e-2
        assert apart < 1e-12 if alpha == 0 else apart > 1e-2
        assert proxy.gap(*_given(exactness.additive_problem(3, seed)), 0.5, alpha)[0] < 1e-12
        assert proxy.gap(*_given(exactness.random_problem(1, seed)), 0.5, alpha)[0] < 1e-12


def _given(problem):
    tree, reward, untuned, other = problem
    return tree, reward, other, untuned


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5])
def test_claim_mixing_misses_the_normalisers_of_its_states(alpha):
    """`thm-when-exact`: log π° − log π_α of a response is Σ_t log Z(s_t) less one constant.

    π° by enumeration, Z from probabilities; the last level is exact; the sign of log Z for DeRa.
    """
    for seed in range(5):
        tree, reward, untuned, other = exactness.random_problem(3, seed)
        tuned = soft.soft_backup(tree, reward, untuned, 0.5).logp
        for base in (untuned, other):
            mixed = proxy.mix(base, tuned, untuned, alpha)
            z = [
                (b.exp() * (t - u).exp() ** alpha).sum(dim=1, keepdim=True).log()
                for b, t, u in zip(base, tuned, untuned, strict=True)
            ]
            exact = (tree.path_sums(base) + alpha * tree.path_sums(reward) / 0.5).log_softmax(0)
            missed = exact - tree.path_sums(mixed)
            along = tree.path_sums(tuple(x.expand(-1, 4) for x in z))
            constant = (tree.path_sums(mixed) + along).logsumexp(0)
            assert (missed - (along - constant)).abs().max() < 1e-10
            best = soft.soft_backup(tree, reward, base, 0.5 / alpha).logp
            assert (best[-1] - mixed[-1]).abs().max() < 1e-12
            if base is other or alpha != 1.0:
                assert (best[0] - mixed[0]).abs().max() > 1e-3
            if base is untuned:
                assert all((x * (alpha - 1) > -1e-12).all() for x in z)
                assert all((x.abs() > 1e-6).all() == (alpha != 1.0) for x in z)


def test_claim_the_gap_agrees_with_enumeration():
    """Both numbers from response probabilities alone, on one tree."""
    tree, reward, untuned, base = exactness.random_problem(3, 7)
    tuned = soft.soft_backup(tree, reward, untuned, 0.5).logp
    mixed = [
        (b + 2 * (t - u)).log_softmax(-1) for b, t, u in zip(base, tuned, untuned, strict=True)
    ]
    log_mix = tree.path_sums(tuple(mixed))
    log_exact = (tree.path_sums(base) + tree.path_sums(reward) * 2 / 0.5).log_softmax(0)
    worst, kl = proxy.gap(tree, reward, base, untuned, 0.5, 2.0)
    assert abs(worst - (log_mix - log_exact).abs().max().item()) < 1e-10
    assert abs(kl - (log_mix.exp() * (log_mix - log_exact)).sum().item()) < 1e-10
    other_way = (log_exact.exp() * (log_exact - log_mix)).sum().item()
    assert abs(kl - other_way) > 1e-2  # the direction matters


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_bug_the_kl_of_the_gap_is_what_the_mix_loses(alpha):
    """V° − J(π_α) = (β₀/α) KL(π_α ‖ π°), by sums over responses; the other KL is another number.

    `thm-when-exact`, `eq-regret`
    """
    for seed in range(5):
        tree, reward, untuned, base = exactness.random_problem(3, seed)
        tuned = soft.soft_backup(tree, reward, untuned, 0.5).logp
        log_mix = tree.path_sums(proxy.mix(base, tuned, untuned, alpha))
        log_base, returns = tree.path_sums(base), tree.path_sums(reward)
        price = 0.5 / alpha
        value = price * (log_base + returns / price).logsumexp(0)
        earned = (log_mix.exp() * (returns - price * (log_mix - log_base))).sum()
        kl = proxy.gap(tree, reward, base, untuned, 0.5, alpha)[1]
        assert abs((value - earned).item() - price * kl) < 1e-10
