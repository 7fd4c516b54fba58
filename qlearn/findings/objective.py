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
    """β (None: unknown), the loss in words, the file that says so, and why it is no advantage.

    `problem` is empty where β log π/π_ref is a soft advantage, else half a sentence.
    """

    beta: float | None
    loss: str
    source: str | None
    problem: str

    @property
    def is_plain(self) -> bool:
        """Whether log π/π_ref times β is a soft advantage, whatever β is."""
        return self.loss in ("sigmoid", "ppo", "rloo")

    @property
    def is_advantage(self) -> bool:
        return self.is_plain and self.beta is not None


def objective_of(policy: str) -> Objective:
    """The objective that a policy's directory records; a file beside a checkpoint counts too.

    qlearn.yaml is read first, then TRL's training_args.bin, in the directory and, where that is
    called checkpoint-500 or so, in the one above. What cannot be read is said in `problem`.
    """
    folders = [policy]
    if re.fullmatch(r"checkpoint-\d+", os.path.basename(os.path.normpath(policy))):
        folders.append(os.path.dirname(os.path.abspath(policy)))
    problems = []
    for folder in folders:
        for name, read in ((OURS, _ours), (TRLS, _trls)):
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                objective = read(path)
                if objective.beta is not None or objective.source:
                    return objective
                problems.append(objective.problem)
    problem = "; ".join(problems) or f"{policy} has neither {OURS} nor {TRLS}"
    return Objective(None, "unknown", None, problem)


def with_beta(objective: Objective, beta: float | None) -> Objective:
    """The objective where the user gives β (None: leaves it to the run's file).

    It replaces the file's. A run without a file is taken at its word: DPO's plain loss. A loss that
    is known and not plain stays what it is.
    """
    if beta is None:
        return objective
    if objective.loss == "unknown" and objective.source is None:
        return Objective(beta, "sigmoid", "--beta", "")
    problem = "" if objective.is_plain else objective.problem
    return objective._replace(beta=beta, problem=problem)


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
        return Objective(None, "unknown", path, f"{path} names no loss_type")
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
        problem = f"{path} says beta {_brief(beta)}, which is not a positive number"
    else:
        problem = ""
    return Objective(float(beta) if _is_positive(beta) else None, loss, path, problem)


def _is_one_of(value, plain: tuple) -> bool:
    if isinstance(value, list) and len(value) == 1:
        (value,) = value  # TRL's loss_type was a word once and is a list of them now
    return _is_simple(value) and value in plain


def _is_positive(beta) -> bool:
    number = isinstance(beta, (int, float)) and not isinstance(beta, bool)
    return number and 0 < beta < 1e300


def _brief(value) -> str:
    """A setting as it stands in a sentence; what is not a word, a number or a few is a kind."""
    if isinstance(value, list) and len(value) < 6 and all(map(_is_simple, value)):
        return " + ".join(map(_brief, value)) or "[]"
    simple = _is_simple(value) and not (isinstance(value, int) and abs(value) > 1e18)
    text = str(value) if simple else ""
    return text if 0 < len(text) < 40 else f"of the kind {type(value).__name__}"


def _is_simple(value) -> bool:
    return value is None or isinstance(value, (str, int, float))
