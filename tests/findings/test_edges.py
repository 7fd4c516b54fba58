"""The findings at their edges: no rows, equal numbers, NaN, margins of every size, α at its limits.

What a command line calls is tested with its files, in the other modules of this folder.
"""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlearn.errors import InputError
from qlearn.exact import soft
from qlearn.exact.tree import ABSENT, TERMINAL, Tree
from qlearn.findings import credit, likelihood, proxy, stats

from ..edges import TESTED, check_refused, close, edge, few, public_names
from ..exact.worlds import small_problem

NAN, INF = math.nan, math.inf
COMMANDS = {  # read files and settings: test_likelihood.py, test_search.py, test_cli.py
    "likelihood.DiagnoseConfig", "likelihood.DiagnoseConfig.evidence", "likelihood.read_metrics",
    "likelihood.run", "search.SearchConfig", "search.run", "search.load_prompts",
    "search.load_policy", "search.load_forecast", "search.exact_forecast", "search.write",
}  # fmt: skip
sizes = st.floats(-1e3, 1e3) | st.sampled_from([0.0, 0.1, 1e-300, 1e100, -1e100])
rows = st.lists(sizes, min_size=2, max_size=8)


def test_claim_every_finding_has_an_edge_test():
    commands = {f"qlearn.findings.{name}" for name in COMMANDS}
    names = public_names("qlearn.findings")
    assert names - TESTED - commands == set() and commands <= names


# --- statistics --------------------------------------------------------------------------------


@edge(stats.auroc)
@few
@given(st.lists(st.tuples(sizes | st.sampled_from([INF, -INF]), st.booleans()), max_size=8))
def test_claim_auroc_counts_pairs_at_any_size(rows):
    score, positive = [x for x, _ in rows], [p for _, p in rows]
    pairs = [(x, y) for x, p in rows if p for y, q in rows if not q]
    if not pairs:
        check_refused(lambda: stats.auroc(score, positive), "needs both classes")
        return
    expected = sum((x > y) + (x == y) / 2 for x, y in pairs) / len(pairs)
    for kind in (list, np.array, torch.tensor):
        if kind is torch.tensor:
            got = stats.auroc(torch.tensor(score, dtype=torch.float64), torch.tensor(positive))
        else:
            got = stats.auroc(kind(score), kind(positive))
        assert close(got, expected)


@pytest.mark.filterwarnings("error", "ignore:Precision loss")  # scipy's own, and honest
@edge(stats.paired_bootstrap, stats.equivalent, stats.mcnemar)
@few
@given(rows, sizes)
def test_claim_pairs_of_any_size_give_numbers(first, shift):
    """Alike up to a shift, or not: no NaN, no warning; equal pairs have an interval of width 0."""
    second = [x + shift for x in first]
    found = stats.paired_bootstrap(first, first[::-1], level=0.9)
    assert found.low <= found.high and found.level == 0.9
    assert close(
        found.estimate, statistics.fmean(np.subtract(first, first[::-1])), max(map(abs, first))
    )
    same = stats.paired_bootstrap(first, first)
    assert tuple(same) == (0, 0, 0, 0.95)
    verdict, p = stats.equivalent(first, first, 1e-3)
    assert verdict and p == 0
    verdict, p = stats.equivalent(first, second, 10.0)
    assert 0 <= p <= 1 and verdict == (p < 0.05)
    flags = [x > 0 for x in first]
    assert 0 < stats.mcnemar(flags, flags[::-1]) <= 1 and stats.mcnemar(flags, flags) == 1


@edge(stats.hodges_lehmann, stats.signed_rank)
@few
@given(st.lists(sizes, min_size=2, max_size=8))
def test_claim_signed_ranks_at_any_size(x):
    found = stats.hodges_lehmann(x)
    walsh = [(a + b) / 2 for i, a in enumerate(x) for b in x[i:]]
    assert close(found.estimate, statistics.median(walsh), max(map(abs, walsh)))
    assert found.low <= found.estimate <= found.high
    assert close(found.level, 1 - 2 ** (1 - len(x))) or found.level >= 0.95
    assert 0 < stats.signed_rank(x) <= 1
    assert stats.signed_rank([0.0] * len(x)) == 1


@edge(stats.holm)
@few
@given(st.dictionaries(st.text(max_size=2), st.floats(0, 1), max_size=6))
def test_claim_holm_keeps_order_and_bounds(p):
    adjusted = stats.holm(p)
    assert list(adjusted) == list(p)
    for name, x in p.items():
        k = sorted(p.values()).index(x)
        assert min(1, (len(p) - k) * x) <= adjusted[name] + 1e-15 and x <= adjusted[name] <= 1
    names = sorted(p, key=p.get)
    assert [adjusted[n] for n in names] == sorted(adjusted.values())


@edge(stats.cluster_bootstrap)
@few
@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(0, 3)), max_size=8))
def test_claim_clusters_of_any_number(rows):
    x, clusters = np.array([r for r, _ in rows]), [f"post {c}" for _, c in rows]
    if len(set(clusters)) < 2:
        check_refused(lambda: stats.cluster_bootstrap(np.mean, [x], clusters), "at least two")
        return
    found = stats.cluster_bootstrap(np.mean, [x], clusters, resamples=20)
    assert min(x) - 1e-9 <= found.low <= found.high <= max(x) + 1e-9
    assert close(found.estimate, statistics.fmean(x), 10)


def test_claim_bad_samples_are_refused():
    two = [0.0, 1.0]
    for bad in ([NAN, 0.0], [INF, 0.0], [1e200, 0.0], ["a", "b"], [0.0], [], [two, two]):
        for f in (stats.paired_bootstrap, stats.mcnemar, lambda a, b: stats.equivalent(a, b, 1.0)):
            check_refused(lambda f=f, b=bad: f(b, two), "Pairs")
    for bad in ([NAN, 0.0], [INF, 0.0], [1e200, 0.0], [two, two]):
        check_refused(lambda b=bad: stats.hodges_lehmann(b), "one row of finite numbers")
        check_refused(lambda b=bad: stats.signed_rank(b), "one row of finite numbers")
    check_refused(lambda: stats.signed_rank([]), "at least one difference")
    for level in (0, 1, NAN, "0.9"):
        for call in (
            lambda v: stats.paired_bootstrap(two, two, level=v),
            lambda v: stats.hodges_lehmann(two, v),
            lambda v: stats.cluster_bootstrap(np.mean, [two], two, level=v),
            lambda v: stats.equivalent(two, two, 1.0, v),
        ):
            check_refused(lambda c=call, v=level: c(v), r"level must lie in \(0, 1\)")
    for margin in (0, -1, NAN, INF):
        check_refused(lambda m=margin: stats.equivalent(two, two, m), "must be positive")
    check_refused(lambda: stats.cluster_bootstrap(np.mean, [two], two, resamples=0), "resamples")
    for p in (-0.1, 1.1, NAN, None):
        check_refused(lambda p=p: stats.holm({"a": p}), "p-value of a must lie in")
    for score, label in (([NAN, 0.0], [True, False]), (two, [True]), ([two], [[True, False]])):
        check_refused(lambda s=score, x=label: stats.auroc(s, x), "one score a row")


# --- borrowed advantages, margins, credit ------------------------------------------------------


@edge(proxy.mix, proxy.gap)
def test_claim_mixes_keep_what_is_absent_and_have_limits():
    """α = 0 and α so small that β/α overflows: the base; DeRa is exact at the price β/α on a
    single choice; 0/0 at ABSENT actions is not lent; fields that do not fit are refused."""
    tree, reward, log_ref = small_problem(3)
    base = small_problem(4)[2]
    for alpha in (0, 1e-320, 1e-300):
        worst, kl = proxy.gap(tree, reward, base, log_ref, 0.5, alpha)
        assert abs(worst) < 1e-12 and abs(kl) < 1e-12
    fork = Tree((torch.tensor([[TERMINAL, ABSENT, TERMINAL]]),))
    ref = (torch.tensor([[0.25, 0.0, 0.75]], dtype=torch.float64).log(),)
    pay = (torch.tensor([[1.0, NAN, -1.0]], dtype=torch.float64),)
    for alpha in (0.5, 1.0, 3.0):
        worst, kl = proxy.gap(fork, pay, ref, ref, 0.5, alpha)
        assert worst < 1e-12 and abs(kl) < 1e-12
    tuned = soft.soft_backup(fork, pay, ref, 0.5).logp
    assert torch.allclose(proxy.mix(ref, tuned, ref, 1.0)[0].exp(), tuned[0].exp())
    for alpha in (-1, NAN, INF, None):
        check_refused(lambda a=alpha: proxy.gap(fork, pay, ref, ref, 0.5, a), "alpha must lie in")
    check_refused(lambda: proxy.mix(ref, tuned, log_ref, 1.0), "untuned must have one")
    check_refused(lambda: proxy.mix(ref, tuned, ref, NAN), "alpha must lie in")


@edge(proxy.tilted)
def test_claim_tilted_models_need_a_finite_exponent(model, other):
    for alpha in (NAN, INF, None):
        check_refused(lambda a=alpha: proxy.tilted(model, other, model, a), "alpha must lie in")
    assert len(proxy.tilted(model, other, model, 0.0).models) == 2


@edge(likelihood.variance_of_margin)
def test_bug_the_variance_of_a_margin_is_right_at_every_size():
    """A rule of 180 nodes was 0.5 % off at a margin of 100: v = m + m²/2 below, π m²/4 + π²/6 far
    above, and in between the margin of v is m, by a sum over a fine grid."""
    assert likelihood.variance_of_margin(0) == 0
    for m in (1e-300, 1e-12, 1e-9, 1e-6):
        assert close(likelihood.variance_of_margin(m), m + m**2 / 2, m, rel=1e-8)
    for m in (1e4, 1e6, 1e100, 1e150):
        assert close(likelihood.variance_of_margin(m), math.pi / 4 * m**2, m**2, rel=1e-6)
    z = np.linspace(-10, 10, 400_001)
    weight = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    for m in (0.01, 0.3, 1.0, 4.0, 10.0, 100.0):
        v = likelihood.variance_of_margin(m)
        gap = math.sqrt(2 * v) * z
        assert close(float(weight @ (gap * np.tanh(gap / 2))), m, rel=1e-7)
    for bad in (-1e-9, NAN, INF, 1e200, None):
        check_refused(lambda b=bad: likelihood.variance_of_margin(b), "margin must lie in")


@edge(likelihood.diagnose)
def test_claim_a_diagnosis_needs_lines_and_a_price():
    line = dict(zip(likelihood.REWARDS, (0.5, -0.5), strict=True))
    with pytest.raises(InputError, match="a diagnosis needs 3"):
        likelihood.diagnose([line, line, {}], 0.1)
    for beta in (0, -1, NAN, INF, None):
        check_refused(lambda b=beta: likelihood.diagnose([line] * 3, b), "beta must be")
    still = likelihood.diagnose([dict.fromkeys(likelihood.REWARDS, 0.0)] * 3, 0.1)
    assert still.verdict == "not learning" and still.numbers["expected_mean"] == 0


@edge(credit.token_credit, credit.one_step_map, likelihood.log_ratio_and_kl)
def test_claim_rows_of_one_token_and_no_rows(model, other):
    """No rows: no credit. One token: its log-ratio; a model against itself: 0 everywhere."""
    assert credit.token_credit(model, other, [], 0.1) == credit.one_step_map(model, []) == []
    row = ([3, 4], [5])
    (found,) = credit.token_credit(model, other, [row], 0.5)
    with torch.no_grad():
        logs = [m(torch.tensor([[3, 4]])).logits[0, -1].log_softmax(-1) for m in (model, other)]
    ratio = (logs[0][5] - logs[1][5]).item()
    assert found.advantage.item() == pytest.approx(0.5 * ratio, abs=1e-5)
    assert found.value.tolist() == found.advantage.tolist()
    p = logs[1].exp()
    assert credit.one_step_map(other, [row])[0].item() == pytest.approx(
        (1 - 2 * p[5] + (p**2).sum()).item(), abs=1e-5
    )
    by_ratio, by_kl = likelihood.log_ratio_and_kl(model, other, [row])
    assert by_ratio.item() == pytest.approx(ratio, abs=1e-5)
    assert by_kl.item() == pytest.approx(-(p * (logs[1] - logs[0])).sum().item(), abs=1e-5)
    same = likelihood.log_ratio_and_kl(model, model, [row])
    assert not same[0].any() and not same[1].any()
    for beta in (0, NAN, None):
        check_refused(lambda b=beta: credit.token_credit(model, other, [row], b), "beta must be")
    for size in (0, -1, 1.5):
        check_refused(lambda n=size: credit.token_credit(model, other, [row], 1.0, n), "batch_size")
        check_refused(lambda n=size: credit.one_step_map(model, [row], n), "batch_size")
    for rows in ([], [([], [5])], [([3], [])]):
        check_refused(lambda r=rows: likelihood.log_ratio_and_kl(model, other, r), "at least one")


@edge(credit.agreement)
def test_claim_agreement_needs_facts_of_the_same_tokens():
    def told(*advantages):
        x = torch.tensor(advantages)
        return credit.Credit(x, x, x, x, x)

    truth = [{"advantage": a, "kind": k} for a, k in ((0.3, "right"), (-1.0, "slip"), (0.1, "x"))]
    found = credit.agreement([told(0.3, -1.0, 0.1)], [truth])
    assert found["spearman_facts"] == pytest.approx(1) and found["pearson_all"] == pytest.approx(1)
    assert (found["facts"], found["tokens"]) == (2, 3)
    check_refused(lambda: credit.agreement([], []), "at least two tokens")
    check_refused(lambda: credit.agreement([told(0.1)], [truth]), "the same tokens")
    check_refused(lambda: credit.agreement([told(0.1, 0.2, 0.3)], []), "the same tokens")
    check_refused(lambda: credit.agreement([told(0.1, 0.2)], [truth[1:]]), "at least two tokens")
