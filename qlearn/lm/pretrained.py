"""Reading the files of models and tokenizers, with one sentence for what cannot be read."""

import os

from qlearn.errors import InputError, reason_of
from qlearn.lm import hub


def from_pretrained(loader, name: str, what: str, **options):
    """`loader.from_pretrained(name)`; `what` is "model" or "tokenizer", for the message.

    Raises: InputError where neither a directory nor the hub has it.
    """
    reached = os.path.isdir(name) or hub.can_be_reached()
    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        if os.path.isdir(name):
            raise InputError(f"The directory {name} holds no {what} that transformers can read: "
                             f"{reason_of(error)}.") from error  # fmt: skip
        reason = reason_of(error) if reached else hub.reason()
        raise InputError(
            f"Could not read the {what} {name!r} as a directory or from the hub; without a network "
            f"pass the path of a local directory instead ({reason})."
        ) from error
