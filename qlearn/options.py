"""How a configuration declares a field, so that its flag on the command line has a sentence."""

from dataclasses import field


def option(default, text: str):
    """A field of a configuration: its default and what `--help` says about it."""
    return field(default=default, metadata={"help": text})


def required(text: str):
    """A field of a configuration that has no default."""
    return field(metadata={"help": text})
