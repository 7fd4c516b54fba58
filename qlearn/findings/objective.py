"""What a policy was trained on, read from the run's own file: when is a log-ratio an advantage?

β log π/π_ref is a soft advantage (Eq. 10) where the policy maximises reward − β KL(π‖π_ref): after
qlearn's dpo and ppo, and after TRL's DPO with its plain sigmoid loss. After IPO, label smoothing,
an added NLL term or another divergence the same number means something else, and without β it has
no unit. Then only the log-ratio itself, in nats, is known.
"""

import os
import re
from typing import NamedTuple

from qlearn import recipes
from qlearn.errors import InputError
from qlearn.lm.training_args import read_training_args
from qlearn.options import BETAS

OURS, TRLS = "qlearn.yaml", "training_args.bin"

# setting: the values that leave DPO's loss as it is (Eq. 9), as TRL names them, old and new
PLAIN = {
    "loss_type": ("sigmoid",),
    "algorithm": ("ppo", "rloo"),  # of qlearn ppo
    "f_divergence_type": ("reverse_kl",),
    "label_smoothing": (0,),
    "reference_free": (False,),
    "ld_alpha": (None, 1),  # LD-DPO: weight of the tokens beyond the shorter response
    "rpo_alpha": (None, 0),  # weight of the chosen response's NLL
    "use_weighting": (False,),  # WPO: pairs weighted by length-normalised probabilities
    "sync_ref_model": (False,),  # TR-DPO: the reference moves
}


class Objective(NamedTuple):
    """What a run says of its own loss.

    beta: None where it is unknown. loss: "sigmoid", "ppo", "rloo", "unknown", or how it differs.
    source: the file that says so, or "--beta". problem: why β log π/π_ref is not a soft advantage,
    as half a sentence; empty where it is one. recorded: the file's β, which a flag may replace.
    """

    beta: float | None
    loss: str
    source: str | None
    problem: str
    recorded: float | None = None

    @property
    def is_advantage(self) -> bool:
        """Whether log π/π_ref times `beta` is a soft advantage."""
        return not self.problem

    @property
    def takes_beta(self) -> bool:
        """Whether a β from the user would make it one: no file says that the loss was another."""
        return self.loss in ("unknown", *PLAIN["loss_type"], *PLAIN["algorithm"])


def objective_of(policy: str, beta: float | None = None) -> Objective:
    """The objective of a policy, as its own directory records it.

    qlearn.yaml is read first, then TRL's training_args.bin, in the directory and, where that is
    called checkpoint-500 or so, in the one above. What cannot be read is said in `problem`.

    `beta` is the user's: it replaces the file's, and where no file tells the loss, a run is taken
    at the user's word for plain DPO. A loss that a file calls another stays another.
    """
    recorded = _recorded(policy)
    if beta is None or not recorded.takes_beta:
        return recorded
    if recorded.source is None:
        return Objective(beta, "sigmoid", "--beta", "")
    return recorded._replace(beta=beta, problem="")


def _recorded(policy: str) -> Objective:
    folders = [policy]
    if re.fullmatch(r"checkpoint-\d+", os.path.basename(os.path.normpath(policy))):
        folders.append(os.path.dirname(os.path.abspath(policy)))
    problems = []
    for folder in folders:
        for name, read in ((OURS, _ours), (TRLS, _trls)):
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                objective = read(path)
                if objective.source:
                    return objective
                problems.append(objective.problem)
    problem = "; ".join(problems) or f"{policy} has neither {OURS} nor {TRLS}"
    return Objective(None, "unknown", None, problem)


def _ours(path: str) -> Objective:
    try:
        settings = recipes.read_yaml(path)
    except InputError as error:
        return Objective(None, "unknown", None, str(error).rstrip("."))
    if "beta" not in settings:
        return Objective(None, "unknown", None, f"{path} names no beta")
    return _objective(path, settings, settings.get("algorithm", "sigmoid"))


def _trls(path: str) -> Objective:
    try:
        name, settings = read_training_args(path)
    except ValueError as error:
        return Objective(None, "unknown", None, str(error).rstrip("."))
    if "beta" not in settings:
        return Objective(None, "unknown", None, f"{path}, a {name}, names no beta")
    if name != "DPOConfig":
        return Objective(None, name, path, f"{path} is of a {name}, not of a DPOConfig")
    if "loss_type" not in settings:
        return Objective(None, "unknown", None, f"{path} names no loss_type")
    return _objective(path, settings, "sigmoid")


def _objective(path: str, settings: dict, loss: str) -> Objective:
    """Reads β and everything that changes the loss together."""
    beta = settings.get("beta")
    changed = [
        f"{name} {_brief(settings[name])}"
        for name, plain in PLAIN.items()
        if name in settings and not _is_one_of(settings[name], plain)
    ]
    if changed:
        loss = ", ".join(changed)
        problem = f"{path} says {loss}, which is not DPO's plain sigmoid loss"
    elif not _is_positive(beta):
        problem = f"{path} says beta {_brief(beta)}, not a positive number of ordinary size"
    else:
        problem = ""
    beta = float(beta) if _is_positive(beta) else None
    return Objective(beta, loss, path, problem, recorded=beta)


def _is_one_of(value, plain: tuple) -> bool:
    if isinstance(value, list) and len(value) == 1:
        (value,) = value  # TRL's loss_type was a word once and is a list of them now
    return _is_simple(value) and value in plain


def _is_positive(beta) -> bool:
    number = isinstance(beta, (int, float)) and not isinstance(beta, bool)
    return number and BETAS["above"] < beta < BETAS["below"]


def _brief(value) -> str:
    """A setting as it stands in a sentence; what is not a word, a number or a few is a kind."""
    if isinstance(value, list) and len(value) < 6 and all(map(_is_simple, value)):
        return " + ".join(map(_brief, value)) or "[]"
    simple = _is_simple(value) and not (isinstance(value, int) and abs(value) > 1e18)
    text = str(value) if simple else ""
    return text if 0 < len(text) < 40 else f"of the kind {type(value).__name__}"


def _is_simple(value) -> bool:
    return value is None or isinstance(value, (str, int, float))
