"""Reading the files of models and tokenizers, with one sentence for what cannot be read.

transformers fills a weight that a checkpoint lacks with random numbers and goes on. Here that is
refused, by name: nothing that is computed afterwards would mean anything.
"""

import os
import re
from collections.abc import Sequence
from contextlib import contextmanager

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from qlearn.errors import InputError, reason_of
from qlearn.lm import hub
from qlearn.lm.model_files import damaged_file, read_json

# Weights under these names are the model's own, wrapped by torch.compile or by data parallelism.
WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "torch's DataParallel"}
# Buffers that older versions of transformers saved and that are computed today.
BUFFERS = re.compile(
    r"(inv_freq|masked_bias|attn\.bias|attention\.bias|causal_mask|cos_cached|sin_cached|"
    r"position_ids)$"
)
# A second head, learned beside a language model that is complete without it.
VALUE_HEAD = re.compile(r"^(v_head|value_head)\.")
# The head of a sequence or token classifier: what stands below it is no language model any more.
CLASSIFIER = re.compile(r"^(score|classifier|classification_head|qa_outputs)\.")


def from_pretrained(loader, name: str, what: str, **options):
    """`loader.from_pretrained(name)`; `what` is "model" or "tokenizer", for the message.

    Raises: InputError where neither a directory nor the hub has it, naming a file that is damaged.
    """
    if os.path.isfile(name):
        raise InputError(f"{name} is a file; pass the directory in which the {what} is.")
    reached = os.path.isdir(name) or hub.can_be_reached()
    try:
        return loader.from_pretrained(name, **options)
    except MemoryError:
        raise
    except Exception as error:  # the many failures of reading have no common class
        if os.path.isdir(name):
            damaged = damaged_file(name)
            if damaged:
                raise InputError(f"{damaged}; copy the file again.") from error
            raise InputError(f"The directory {name} holds no {what} that transformers can read: "
                             f"{reason_of(error)}.") from error  # fmt: skip
        reason = reason_of(error) if reached else hub.reason()
        raise InputError(
            f"Could not read the {what} {name!r} as a directory or from the hub; without a network "
            f"pass the path of a local directory instead ({reason})."
        ) from error


def load_weights(loader, name: str, what: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model called `name` with every weight from its checkpoint; `what` it is, in words.

    Weights saved through torch.compile or DataParallel are read under their own names. Buffers that
    are computed today are not missed, and a value head beside a complete language model is ignored
    with a note.

    Raises: InputError for weights that are missing, of another size, not finite, or that the model
    has no place for; for an adapter without its library; and as `from_pretrained`.
    """
    _check_adapter(name)
    _check_decoder(name)
    options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with _quiet():
        model, report = from_pretrained(loader, name, what, **options)
        for prefix, wrapper in WRAPPERS.items():
            if report["missing_keys"] and any(prefix in key for key in report["unexpected_keys"]):
                renamed = {rf"(^|\.){re.escape(prefix)}": r"\1"}
                print(f"note: {name} was saved through {wrapper}; its {prefix!r} is left out.")
                model, report = from_pretrained(loader, name, what, key_mapping=renamed, **options)
    _check_report(report, name, what)
    for key, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise InputError(
                f"The checkpoint {name} is spoilt: its weight {key} holds NaN or infinity; pass an "
                "earlier checkpoint of that run."
            )
    return model


def _check_report(report: dict, name: str, what: str) -> None:
    missing = sorted(report["missing_keys"])
    unexpected = sorted(key for key in report["unexpected_keys"] if not BUFFERS.search(key))
    if report["mismatched_keys"]:
        key, saved, wanted = min(report["mismatched_keys"])
        raise InputError(
            f"The checkpoint {name} does not fit its config.json: {key} has the sizes "
            f"{tuple(saved)} where the configuration asks for {tuple(wanted)}; copy both from one "
            "model."
        )
    if missing:
        raise InputError(
            f"The checkpoint {name} holds no {what}: it lacks {_names(missing)}, which would be "
            f"random{_instead(unexpected)}; {_remedy(unexpected)}."
        )
    if any(map(CLASSIFIER.match, unexpected)) and what == "language model":
        raise InputError(
            f"The checkpoint {name} is a reward model or classifier (it has {_names(unexpected)}), "
            "not a language model; pass the model that it was trained from, or a policy."
        )
    extra = [key for key in unexpected if VALUE_HEAD.match(key)]
    if len(extra) < len(unexpected):
        odd = [key for key in unexpected if key not in extra]
        raise InputError(
            f"The checkpoint {name} has weights that its config.json has no place for, "
            f"{_names(odd)}; leaving them out would give another model: copy config and weights "
            "from one model."
        )
    if extra:
        print(f"note: {name} has a value head beside its {what}, which is not used here.")


def _instead(unexpected: Sequence[str]) -> str:
    return f" (it has {_names(unexpected)} instead)" if unexpected else ""


def _remedy(unexpected: Sequence[str]) -> str:
    """What to do about missing weights, from the names of those that are there."""
    if any(map(CLASSIFIER.match, unexpected)):
        return "it is a reward model or classifier, so pass the language model it was trained from"
    if any(key.startswith(("lm_head.", "embed_out.")) for key in unexpected):
        return "it is a language model; `qlearn reward` makes a reward model of it"
    if any(".lora_" in key for key in unexpected):
        return "it is an adapter saved as a model, so merge it into its base and save that"
    inner = [key.partition(".")[0] for key in unexpected if not VALUE_HEAD.match(key)]
    if inner and len(set(inner)) == 1 and len(inner) > 1:
        return (
            f"its weights stand under the prefix {inner[0]!r}, so save the model inside the "
            "wrapper (with its own save_pretrained)"
        )
    return "save the whole model, its head included, or pass another"


def _names(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


def _check_decoder(name: str) -> None:
    settings = read_json(os.path.join(name, "config.json")) or {}
    if settings.get("is_encoder_decoder"):
        raise InputError(
            f"The model {name} ({settings.get('model_type')}) is an encoder-decoder, whose prompt "
            "is no part of its text; use a causal language model."
        )


# --- adapters ----------------------------------------------------------------------------------


def _check_adapter(name: str) -> None:
    """Refuses a PEFT adapter where nothing here could apply it.

    A base model's weights beside the adapter would be read without it, and without a word.
    """
    settings = read_json(os.path.join(name, "adapter_config.json"))
    if settings is not None and not is_peft_available():
        base = settings.get("base_model_name_or_path") or "a base that it does not name"
        raise InputError(
            f"The directory {name} holds a PEFT adapter to {base}, and the library peft is not "
            "here; pip install peft, or merge the adapter into its base and save that."
        )


@contextmanager
def _quiet():
    """transformers' own table of missing weights would stand before our sentence about them."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
