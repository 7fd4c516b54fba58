"""Where probability goes during preference training: Eq. 16, and what a run's own curves say."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import Tensor
from transformers import PreTrainedModel

from qlearn.errors import InputError
from qlearn.exact.check import check_beta, check_number
from qlearn.findings.objective import objective_of
from qlearn.findings.run_log import find_log, is_finite, kind, read_metrics
from qlearn.lm.logprobs import Row, collate, completion_logits
from qlearn.options import BETAS, check_ranges, option, required

REWARDS = ("rewards/chosen", "rewards/rejected")  # TRL's names, and ours
TOO_FAR = 2.0  # a fall of this many times what the margin accounts for
WORSE_NLL, WORSE_SHARE = 1.01, 0.02  # held-out harm: this factor, this rise

# verdict: what to look at next
VERDICTS = {
    "harmful": "Read samples from before and after side by side. Then train less (learning rate, "
    "epochs), raise beta, or add the chosen responses' NLL to the loss.",
    "not learning": "Look at the accuracy on held-out pairs, at a few pairs and their labels, and "
    "at the learning rate.",
    "falls too far": "Measure the NLL of good held-out responses, and read samples: mass may have "
    "gone to responses that are in no pair. Ask whether the pairs come from the reference at all.",
    "falls as expected": "Measure the NLL of good held-out responses and the share of broken "
    "samples before and after: only they tell a benign fall from a harmful one.",
    "benign": "Look at what you care about downstream; the fall is no fault.",
    "rises as expected": "Measure the NLL of good held-out responses and the share of broken "
    "samples before and after: only they tell whether the model got better.",
    "rises": "Read samples. Rewards that rise say that the reference found chosen responses "
    "unlikely, as where no SFT came first; of quality they say nothing.",
}


def log_ratio_and_kl(
    policy: PreTrainedModel, reference: PreTrainedModel, rows: Sequence[Row]
) -> tuple[Tensor, Tensor]:
    """Two estimates of the same number, for each row drawn from the reference: (len(rows),) twice.

    log π/π_ref of the response, and −Σ_t KL(π_ref(·|s_t) ‖ π(·|s_t)) over its states. Under the
    reference their means agree; the second varies less, because each token's choice is averaged
    exactly. Rows must hold complete samples of the reference, in nats.

    Source: Eq. 16; `eq-mean-log-ratio` in the book.
    """
    batch = collate(rows, policy.device)
    with torch.no_grad():
        logp, log_ref = (completion_logits(m, batch).log_softmax(-1) for m in (policy, reference))
    chosen = torch.cat([torch.tensor(completion) for _, completion in rows]).to(logp.device)
    token_ratio = (logp - log_ref).gather(1, chosen[:, None])[:, 0]
    token_kl = (log_ref.exp() * (log_ref - logp)).sum(-1)
    lengths = batch.completion_lengths.tolist()
    per_row = [torch.stack([x.sum() for x in y.split(lengths)]) for y in (token_ratio, -token_kl)]
    return per_row[0].cpu(), per_row[1].cpu()


def variance_of_margin(margin: float) -> float:
    """The v for which E[Δ tanh(Δ/2)] = margin, Δ ~ N(0, 2v): how much Gaussian rewards vary.

    The margin of the best policy where the judge's reward has variance v over the reference's
    responses. Reward units squared; v ≥ margin.

    Raises: ValueError for a margin that is negative or above 10¹⁵⁰, where its square ends.
    Source: `eq-gaussian-margin` in the book.
    """
    check_number("margin", margin, least=0, most=1e150)
    if margin < 1e-12:  # v = m + m²/2 + ...
        return float(margin)

    def excess(v: float) -> float:
        scale = math.sqrt(2 * v)

        def density(z: float) -> float:  # Δ = scale · z; both signs of z count alike
            gap = scale * z
            return 2 * gap * math.tanh(gap / 2) * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)

        bend = min(40 / scale, 6.0)  # beyond it tanh is 1
        parts = (quad(density, *ends, epsabs=0, epsrel=1e-11) for ends in ((0, bend), (bend, 12)))
        return sum(part for part, _ in parts) - margin

    # x tanh(x/2) lies between |x| − 0.6 and x²/2
    low, high = 0.99 * margin, 1.01 * math.pi / 4 * (margin + 0.6) ** 2
    return brentq(excess, low, high, xtol=1e-12 * margin, rtol=1e-12)


class Diagnosis(NamedTuple):
    """verdict: a key of `VERDICTS`; sentence: the same in words; numbers: what it rests on;
    look_at: what to look at next."""

    verdict: str
    sentence: str
    numbers: dict[str, float]
    look_at: str


def diagnose(
    metrics: Sequence[dict],
    beta: float,
    nll: tuple[float, float] | None = None,
    unreadable: tuple[float, float] | None = None,
) -> Diagnosis:
    """What the curves of a DPO run say, in words, with the numbers behind them.

    `metrics` are logged lines with TRL's names; the last third of them counts as the end. Let them
    be held-out lines where pairs were seen more than once: a margin learned by heart excuses any
    fall.
    Held-out evidence, (before, after), overrules the curves: harm is a rise of 1 % in `nll`, the
    −log π of good responses, or of 0.02 in `unreadable`, the share of broken samples.

    What fall to expect follows from the margin. Were rewards Gaussian over the reference's
    responses with variance v, the optimum would have margin E[Δ tanh(Δ/2)], Δ ~ N(0, 2v), and
    (chosen + rejected)/2 = −v/2β. Twice that fall is called too far. A smaller fall is usual: it
    is what an unfinished training, or a reward with a bound, gives.

    Lines whose rewards are not finite numbers are left out, and the sentence says so.

    Raises: InputError for fewer than three lines with implicit rewards, or rewards beyond 1e100;
    ValueError for β that is not positive and finite.
    Source: Eq. 16; `eq-sign-law` and `eq-gaussian-margin` in the book.
    """
    check_beta(beta)
    lines, left_out = usable_lines(metrics)
    if len(lines) < 3:
        raise InputError(
            f"A diagnosis needs 3 lines with {' and '.join(REWARDS)} as finite numbers, and the "
            f"log has {len(lines)}.{left_out}"
        )
    last = lines[-max(2, len(lines) // 3) :]
    chosen, rejected = (fmean(line[key] for line in last) for key in REWARDS)
    margin, mean = chosen - rejected, (chosen + rejected) / 2
    noise = stdev(line[REWARDS[0]] - line[REWARDS[1]] for line in last) / math.sqrt(len(last))
    learned = margin > 2 * noise
    expected = -variance_of_margin(margin) / (2 * beta) if learned else 0.0
    numbers = {
        "beta": beta, "chosen": chosen, "rejected": rejected, "margin": margin,
        "margin_standard_error": noise, "mean": mean, "expected_mean": expected,
        "expected_chosen": expected + margin / 2 if learned else 0.0,
    }  # fmt: skip
    evidence = {"nll": nll, "unreadable": unreadable}
    for name, pair in evidence.items():
        if pair is not None:
            numbers |= {f"{name}_before": pair[0], f"{name}_after": pair[1]}
    worse = []
    if nll is not None and nll[1] > WORSE_NLL * nll[0]:
        worse.append(f"the NLL of good responses rose from {nll[0]:.3g} to {nll[1]:.3g} nats")
    if unreadable is not None and unreadable[1] > unreadable[0] + WORSE_SHARE:
        worse.append(
            f"the share of broken samples rose from {unreadable[0]:.1%} to {unreadable[1]:.1%}"
        )
    if worse:
        verdict = "harmful"
    elif not learned:
        verdict = "not learning"
    elif chosen >= 0:
        verdict = "rises as expected" if numbers["expected_chosen"] > 0 > mean else "rises"
    elif nll or unreadable:
        verdict = "benign"
    elif mean < TOO_FAR * expected:
        verdict = "falls too far"
    else:
        verdict = "falls as expected"
    sentence = _curves(numbers, learned) + _meaning(verdict, numbers, worse) + left_out
    return Diagnosis(verdict, sentence, numbers, VERDICTS[verdict])


def usable_lines(metrics: Sequence[dict]) -> tuple[list[dict], str]:
    """The logged lines with both rewards as finite numbers, and a sentence on those without.

    Lines that have no rewards, as of an evaluation, are neither.
    """
    lines = [line for line in metrics if all(key in line for key in REWARDS)]
    bad = [(line, key) for line in lines for key in REWARDS if not is_finite(line[key])]
    usable = [line for line in lines if all(is_finite(line[key]) for key in REWARDS)]
    if not bad:
        return usable, ""
    line, key = bad[0]
    step = f"step {line['step']}" if is_finite(line.get("step")) else "a line without a step"
    return usable, (
        f" {len(lines) - len(usable)} of the log's {len(lines)} lines are left out, the first at "
        f"{step}: its {key} is {kind(line[key])}, not a finite number."
    )


def _curves(x: dict[str, float], learned: bool) -> str:
    moved = "fell" if x["chosen"] < 0 else "rose"
    grown = f"are {x['margin']:.3g} above" if learned else "cannot be told from"
    return (
        f"Chosen rewards {moved} to {x['chosen']:.3g}; they {grown} rejected ones, which stand at "
        f"{x['rejected']:.3g}. "
    )


def _meaning(verdict: str, x: dict[str, float], worse: Sequence[str]) -> str:
    law = (
        f"At beta {x['beta']:g} such a margin goes with a mean of about {x['expected_mean']:.3g} "
        f"where pairs come from the reference; here it is {x['mean']:.3g}."
    )
    return {
        "harmful": f"Whatever the curves say, the model got worse: {' and '.join(worse)}.",
        "not learning": "Nothing has been learned that these curves can show.",
        "falls too far": f"{law} So the pairs alone do not account for this fall.",
        "falls as expected": f"{law} So the optimum itself asks for such a fall: rewards are "
        "measured from the prompt's soft value, not from zero.",
        "benign": f"{law} Held out, nothing got worse: mass moved from bad responses to good ones.",
        "rises as expected": f"{law} So at such a beta the optimum itself has chosen rewards above "
        f"zero, here about {x['expected_chosen']:.3g}.",
        "rises": f"{law} So the chosen responses do not look like the reference's own.",
    }[verdict]


# --- qlearn diagnose ---------------------------------------------------------------------------


@dataclass(frozen=True)
class DiagnoseConfig:
    """Settings of `qlearn diagnose RUN_DIR`."""

    run_dir: str = required(
        "a DPO run: ours (metrics.jsonl) or TRL's (trainer_state.json), the directory or the file"
    )
    beta: float | None = option(
        None, "the run's beta; default: as its qlearn.yaml or training_args.bin says", **BETAS
    )
    nll_before: float | None = option(
        None,
        "mean -log π of good held-out responses under the reference, nats a response",
        at_least=0,
    )
    nll_after: float | None = option(None, "the same under the trained policy", at_least=0)
    unreadable_before: float | None = option(
        None,
        "share of the reference's samples that are broken: endless, empty, garbled",
        at_least=0,
        at_most=1,
    )
    unreadable_after: float | None = option(
        None, "the same of the trained policy's samples", at_least=0, at_most=1
    )

    def __post_init__(self):
        check_ranges(self)
        for name in ("nll", "unreadable"):
            if self.evidence(name).count(None) == 1:
                raise InputError(
                    f"{name}_before and {name}_after are of use only together; pass both."
                )

    def evidence(self, name: str) -> tuple[float | None, float | None]:
        return getattr(self, f"{name}_before"), getattr(self, f"{name}_after")


def run(config: DiagnoseConfig) -> Diagnosis:
    """`qlearn diagnose`: prints the verdict, its numbers and what to look at next."""
    log = find_log(config.run_dir)
    objective = objective_of(str(log.parent), config.beta)
    if objective.source is None and log.parent != Path(config.run_dir) != log:
        objective = objective_of(config.run_dir, config.beta)
    if not objective.is_advantage:
        remedy = "pass the run's with --beta" if objective.takes_beta else "read its curves by eye"
        raise InputError(
            f"What to expect depends on beta and holds for DPO's plain loss only: "
            f"{objective.problem}; {remedy}."
        )
    pairs = (config.evidence(name) for name in ("nll", "unreadable"))
    evidence = (None if pair[0] is None else pair for pair in pairs)
    found = diagnose(read_metrics(str(log)), objective.beta, *evidence)
    print(f"{found.verdict}: {found.sentence}\n")
    for name, number in found.numbers.items():
        print(f"  {name:22} {number:.4g}")
    print(f"\nNext: {found.look_at}")
    return found
