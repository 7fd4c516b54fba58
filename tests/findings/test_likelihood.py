"""The diagnosis of a run: each verdict on hand-made curves, the law behind it, its files."""

import json
import math

import numpy as np
import pytest

from qlearn import cli
from qlearn.errors import InputError
from qlearn.findings.likelihood import (
    VERDICTS,
    DiagnoseConfig,
    diagnose,
    read_metrics,
    run,
    usable_lines,
    variance_of_margin,
)


def curve(chosen, rejected, steps=12, wobble=0.01):
    """A log that goes from 0 to these rewards in half the run and stays there, nearly."""
    lines = []
    for step in range(1, steps + 1):
        part, up = min(1, 2 * step / steps), wobble * (-1) ** step
        lines.append({"step": step, "loss": 0.6, "rewards/chosen": part * chosen + up,
                      "rewards/rejected": part * rejected - up})  # fmt: skip
    return lines


@pytest.mark.parametrize("margin", [1e-4, 0.3, 1.0, 4.0, 30.0])
def test_reference_variance_of_margin_by_simulation(margin):
    """Two million draws of Δ with the variance found have the margin asked for.

    `eq-gaussian-margin`
    """
    v = variance_of_margin(margin)
    gap = np.random.default_rng(0).normal(0, np.sqrt(2 * v), 2_000_000)
    assert (gap * np.tanh(gap / 2)).mean() == pytest.approx(margin, rel=5e-3)
    assert v >= margin * (1 - 1e-6)


def test_claim_chosen_rewards_that_rise_are_expected_at_a_large_beta():
    """The slot world's own optimum at β = 2 has chosen 0.13 and rejected −0.84."""
    log = curve(0.13, -0.84)
    assert diagnose(log, beta=2.0).verdict == "rises as expected"
    assert diagnose(log, beta=0.5).verdict == "rises"
    assert diagnose(curve(1.6, 0.6), beta=2.0).verdict == "rises"  # both rise: no optimum does that


@pytest.mark.parametrize(
    ("verdict", "log", "evidence"),
    [
        ("falls as expected", curve(-0.42, -1.05), {}),
        ("falls too far", curve(-6.0, -6.6), {}),
        ("benign", curve(-0.42, -1.05), {"nll": (18.7, 17.2)}),
        ("benign", curve(-6.0, -6.6), {"unreadable": (0.08, 0.09)}),
        ("harmful", curve(-0.42, -1.05), {"nll": (18.7, 19.4)}),
        ("harmful", curve(0.3, -0.4), {"nll": (18.7, 17.2), "unreadable": (0.1, 0.9)}),
        ("rises", curve(0.3, -0.4), {}),
        ("rises", curve(0.3, -0.4), {"unreadable": (0.1, 0.1)}),
        ("not learning", curve(-0.5, -0.5, wobble=0.2), {}),
        ("not learning", curve(-0.8, -0.3), {}),
    ],
)
def test_claim_each_verdict(verdict, log, evidence):
    found = diagnose(log, beta=0.5, **evidence)
    assert found.verdict == verdict
    assert found.look_at == VERDICTS[verdict] and f"{found.numbers['chosen']:.3g}" in found.sentence


def test_eq_16_what_is_expected_falls_with_one_over_beta():
    """The same curves are as expected at β = 0.1 and too far at β = 4: the law decides, not a
    threshold on the fall. The expectation is −v/2β for the margin's own v."""
    log = curve(-2.0, -2.9)
    assert diagnose(log, beta=0.1).verdict == "falls as expected"
    assert diagnose(log, beta=4.0).verdict == "falls too far"
    low, high = (diagnose(log, beta=b).numbers for b in (0.1, 4.0))
    assert low["expected_mean"] == pytest.approx(40 * high["expected_mean"])
    v = variance_of_margin(low["margin"])
    assert low["expected_mean"] == pytest.approx(-v / 0.2)
    assert low["expected_chosen"] == pytest.approx(low["expected_mean"] + low["margin"] / 2)


def test_claim_the_start_of_a_run_does_not_count():
    """Only the last third is the end, and lines without rewards are passed over."""
    log = [{"step": 0, "skipped": True}, *curve(5.0, 4.0, steps=20), *curve(-0.4, -1.0, steps=40)]
    assert diagnose(log, beta=0.5).numbers["chosen"] == pytest.approx(-0.4, abs=0.02)
    with pytest.raises(InputError, match="the log has 2"):
        diagnose(log[:3], beta=0.5)


def write(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def test_claim_it_reads_our_runs_and_trls(tmp_path, capsys):
    """metrics.jsonl with β from qlearn.yaml; TRL's latest trainer_state.json with --beta."""
    log = curve(-0.42, -1.05)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write(ours, "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in log))
    write(ours, "qlearn.yaml", "beta: 0.5\n")
    for step, lines in ((2, log[:2]), (12, [*log, {"train_runtime": 3.0}])):
        state = {"global_step": step, "log_history": lines}
        write(theirs / f"checkpoint-{step}", "trainer_state.json", json.dumps(state))
    one = run(DiagnoseConfig(run_dir=str(ours)))
    two = run(DiagnoseConfig(run_dir=str(theirs), beta=0.5))
    assert one == two and one.verdict == "falls as expected"
    assert read_metrics(str(theirs))[:-1] == log
    capsys.readouterr()
    assert cli.main(["diagnose", str(ours), "--nll_before", "18", "--nll_after", "19"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("harmful: ") and "18 to 19" in out and "Next: Read samples" in out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "pass the run's with --beta"),
        (["--beta", "0"], "beta must lie in (1e-20, 1e+20), not 0.0"),
        (["--beta", "1", "--nll_before", "3"], "only together"),
        (
            ["--beta", "1", "--unreadable_before", "0", "--unreadable_after", "2"],
            "must lie in [0, 1]",
        ),
    ],
)
def test_claim_bad_input_is_one_sentence(tmp_path, capsys, flags, sentence):
    write(tmp_path, "metrics.jsonl", "".join(json.dumps(x) + "\n" for x in curve(-1, -2)))
    assert cli.main(["diagnose", str(tmp_path), *flags]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


@pytest.mark.parametrize("text", [None, "{", "[1"])
def test_claim_unreadable_metrics_are_named(tmp_path, text):
    if text:
        write(tmp_path, "metrics.jsonl", text)
    with pytest.raises(InputError, match="neither metrics.jsonl nor" if not text else "cannot be"):
        read_metrics(str(tmp_path))


@pytest.mark.parametrize("scale", [300.0, 2600.0, 1e4])
def test_reference_variance_of_a_large_margin_by_its_series(scale):
    """For Δ ~ N(0, s²), s large: margin = s √(2/π) − 4/(s √2π) · [π²/12 − 7π⁴/(240 s²) + …].

    x tanh(x/2) = x − 2x/(eˣ + 1), and ∫ x/(eˣ + 1) = π²/12, ∫ x³/(eˣ + 1) = 7π⁴/120 over x > 0.
    The bend of tanh lies within 1/s of 0, where a rule that does not look for it misses it.
    """
    bend = math.pi**2 / 12 - 7 * math.pi**4 / (240 * scale**2)
    margin = scale * math.sqrt(2 / math.pi) - 4 * bend / (scale * math.sqrt(2 * math.pi))
    assert variance_of_margin(margin) == pytest.approx(scale**2 / 2, rel=3e-9)


def test_claim_a_margin_is_learned_beyond_two_standard_errors():
    """The last two of six lines have margins m ± 0.2, so a standard error of 0.2."""
    for margin, learned in ((0.3, False), (0.5, True)):
        gaps = [9, 9, 9, 9, margin - 0.2, margin + 0.2]
        log = [{"rewards/chosen": -1.0, "rewards/rejected": -1.0 - gap} for gap in gaps]
        found = diagnose(log, beta=0.5)
        assert found.numbers["margin"] == pytest.approx(margin)
        assert found.numbers["margin_standard_error"] == pytest.approx(0.2)
        assert (found.verdict != "not learning") == learned
        assert (found.numbers["expected_mean"] < 0) == (found.numbers["expected_chosen"] != 0)
        assert (found.numbers["expected_mean"] < 0) == learned


@pytest.mark.parametrize(
    ("after", "verdict"), [(100.9, "benign"), (101.1, "harmful"), (99.0, "benign")]
)
def test_claim_harm_is_a_rise_of_one_per_cent_of_the_nll(after, verdict):
    found = diagnose(curve(-0.42, -1.05), beta=0.5, nll=(100.0, after))
    assert found.verdict == verdict
    assert (found.numbers["nll_before"], found.numbers["nll_after"]) == (100.0, after)
    assert f"rose from 100 to {after:.3g} nats" in found.sentence or verdict == "benign"


@pytest.mark.parametrize(
    ("after", "verdict"), [(0.119, "benign"), (0.121, "harmful"), (0.05, "benign")]
)
def test_claim_harm_is_two_broken_samples_more_in_a_hundred(after, verdict):
    found = diagnose(curve(-0.42, -1.05), beta=0.5, unreadable=(0.1, after))
    assert found.verdict == verdict
    assert f"rose from 10.0% to {after:.1%}" in found.sentence or verdict == "benign"


@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [
        (-0.42, -1.05, "Chosen rewards fell to -0.42; they are 0.63 above rejected ones, which "
                       "stand at -1.05. "),
        (0.3, -0.4, "Chosen rewards rose to 0.3; they are 0.7 above rejected ones, which stand at "
                    "-0.4. "),
        (0.0, -1.0, "Chosen rewards rose to 0; they are 1 above rejected ones, which stand at "
                    "-1. "),
        (-0.5, -0.5, "Chosen rewards fell to -0.5; they cannot be told from rejected ones, which "
                     "stand at -0.5. "),
    ],
)  # fmt: skip
def test_claim_the_sentence_begins_with_where_the_curves_stand(chosen, rejected, words):
    assert diagnose(curve(chosen, rejected, wobble=0.0), beta=0.5).sentence.startswith(words)


def test_claim_lines_that_are_left_out_are_counted_and_the_first_is_named():
    """With both rewards finite a line counts; with one of the two keys it is no line of rewards."""
    good = {"step": 1, "rewards/chosen": 0.5, "rewards/rejected": -0.5}
    half = {"step": 2, "rewards/chosen": 0.5}
    nan, text = good | {"step": 3, "rewards/rejected": math.nan}, good | {"rewards/chosen": "1"}
    assert usable_lines([good, half, {"loss": 1.0}]) == ([good], "")
    lines, sentence = usable_lines([half, good, nan, text, good])
    assert lines == [good, good]
    assert sentence == (
        " 2 of the log's 4 lines are left out, the first at step 3: its rewards/rejected is nan, "
        "not a finite number."
    )
    del text["step"]
    assert (
        "the first at a line without a step: its rewards/chosen is a text"
        in (usable_lines([text])[1])
    )


def test_claim_a_log_below_the_run_has_the_runs_own_beta(tmp_path):
    """First the log's own directory speaks, then the run's; a file speaks for its directory."""
    log = "".join(json.dumps(line) + "\n" for line in curve(-0.42, -1.05))
    state = json.dumps({"log_history": curve(-0.42, -1.05)})
    write(tmp_path / "a" / "deep", "trainer_state.json", state)
    write(tmp_path / "a", "qlearn.yaml", "beta: 0.25\n")
    assert run(DiagnoseConfig(run_dir=str(tmp_path / "a"))).numbers["beta"] == 0.25
    write(tmp_path / "a" / "deep", "qlearn.yaml", "beta: 0.75\n")
    assert run(DiagnoseConfig(run_dir=str(tmp_path / "a"))).numbers["beta"] == 0.75
    write(tmp_path / "b", "metrics.jsonl", log)
    file = str(tmp_path / "b" / "metrics.jsonl")
    with pytest.raises(InputError, match=r"b has neither qlearn\.yaml nor .*; pass the run's with"):
        run(DiagnoseConfig(run_dir=file))
    write(tmp_path / "b", "qlearn.yaml", "beta: 0.5\n")
    assert run(DiagnoseConfig(run_dir=file)).numbers["beta"] == 0.5
