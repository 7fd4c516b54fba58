"""What a grid of decoders says: paired contrasts, the control for length, over-optimisation.

A grid is {model: {decoder: {column: (N,)}}} with the same N posts everywhere; `seeds` (N,) says of
which training seed each post's models are. `qlearn.studies.search` makes one.
"""

import numpy as np
from scipy.stats import linregress

from qlearn.findings import stats
from qlearn.studies.slot_world import summarise

WIDTHS = (2, 5, 10, 20)
# (better, worse): named before any run
PAIRS = (
    ("beam5", "greedy"), ("beam5", "sample"), ("greedy", "sample"),
    ("beam5_mean", "greedy"), ("beam20_mean", "beam5_mean"), ("beam20", "beam5"),
)  # fmt: skip

# The same for a policy as a verifier; named after the grid above had been seen, before their run.
VERIFIER_PAIRS = (
    ("best4", "best1"), ("best16", "best4"), ("best16", "best1"), ("best16", "beam5"),
)  # fmt: skip


def contrast(
    first: dict[str, np.ndarray], second: dict[str, np.ndarray], seeds: np.ndarray
) -> dict:
    """first − second on the same posts: win rate, reward, length, and reward at equal length.

    Intervals resample posts (the models are given); `seeds` has {mean, low, high} over seeds.
    p_value: McNemar on lines that strictly beat the writer's. at_equal_length: the intercept of
    the least-squares line of the reward difference on the length difference, and its 95 % interval.
    """
    difference = {k: first[k] - second[k] for k in ("win", "reward", "length")}
    by_seed = [{k: float(x[seeds == s].mean()) for k, x in difference.items()}
               for s in np.unique(seeds)]  # fmt: skip
    return {
        **{k: _interval(first[k], second[k]) for k in difference},
        "seeds": summarise(by_seed),
        "p_value": stats.mcnemar(first["win"] == 1, second["win"] == 1),
        "at_equal_length": at_equal_length(difference["reward"], difference["length"]),
    }


def at_equal_length(reward: np.ndarray, length: np.ndarray) -> dict[str, float]:
    """Least squares of a paired difference in reward on that in length: effect, low, high, slope.

    The effect is the height of the line where the lengths are equal. Where all lengths differ
    alike, or all rewards, there is no line to fit, and the effect is the mean.
    """
    if np.ptp(length) == 0 or np.ptp(reward) == 0:
        effect, error, slope = reward.mean(), reward.std(ddof=1) / len(reward) ** 0.5, 0.0
    else:
        fit = linregress(length, reward)
        effect, error, slope = fit.intercept, fit.intercept_stderr, fit.slope
    return {"effect": float(effect), "low": float(effect - 1.96 * error),
            "high": float(effect + 1.96 * error), "slope": float(slope)}  # fmt: skip


def gain_contrast(model: dict, control: dict, better: str, worse: str) -> dict:
    """(model's gain of `better` over `worse`) − (the control's): win rate and reward.

    p_value: Wilcoxon's signed-rank test on the posts' differences of wins.
    """
    gains = [{k: x[better][k] - x[worse][k] for k in ("win", "reward")} for x in (model, control)]
    found = {k: _interval(gains[0][k], gains[1][k]) for k in ("win", "reward")}
    difference = gains[0]["win"] - gains[1]["win"]
    return found | {"p_value": stats.signed_rank(difference) if difference.any() else 1.0}


def contrasts(cells: dict, seeds: np.ndarray) -> dict:
    """The contrasts that were named before any run, p-values adjusted by Holm over all of them."""
    found = {}
    for name, model in cells.items():
        for better, worse in PAIRS:
            key = f"{name}_{better}_over_{worse}"
            found[key] = contrast(model[better], model[worse], seeds)
        if name != "sft":
            for worse in ("greedy", "sample"):
                key = f"{name}_over_sft_beam5_over_{worse}"
                found[key] = gain_contrast(model, cells["sft"], "beam5", worse)
    adjusted = stats.holm({key: x["p_value"] for key, x in found.items()})
    return {key: x | {"p_holm": adjusted[key]} for key, x in found.items()}


def verifier(cells: dict, seeds: np.ndarray) -> dict:
    """Best of n: the SFT model's samples, chosen by each policy's implicit reward.

    H0: more samples to choose from change nothing. A verifier that is over-optimised would take
    worse lines out of 16 than out of 4. Intervals are single ones, without Holm's adjustment.
    """
    return {
        f"{name}_{better}_over_{worse}": contrast(model[better], model[worse], seeds)
        for name, model in cells.items() if name != "sft" for better, worse in VERIFIER_PAIRS
    }  # fmt: skip


def over_optimisation(cells: dict, seeds: np.ndarray) -> dict:
    """N6: what a wider beam does to implicit and to true reward, for each model and penalty.

    Per seed: the change from greedy to the widest beam, and the quadratic coefficient over log₂
    width of each; {mean, low, high} over seeds. Implicit up while true is down, and a negative
    coefficient of the true reward, would be over-optimisation.
    """
    result = {}
    for name, model in cells.items():
        for ending in ("", "_mean"):
            ladder = ["greedy", *(f"beam{n}{ending}" for n in WIDTHS)]
            per_seed = []
            for s in np.unique(seeds):
                row = {}
                for key in ("implicit", "reward", "length"):
                    y = [model[decoder][key][seeds == s].mean() for decoder in ladder]
                    row[f"{key}_change"] = float(y[-1] - y[0])
                    row[f"{key}_curve"] = float(np.polyfit(np.log2([1, *WIDTHS]), y, 2)[0])
                per_seed.append(row)
            result[name + ending] = summarise(per_seed)
    return result


def _interval(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    found = stats.paired_bootstrap(first, second)
    return {"mean": found.estimate, "low": found.low, "high": found.high}
