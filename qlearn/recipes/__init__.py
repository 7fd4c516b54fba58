"""Recipes: the settings of every run that the book reports, shipped with the library.

A recipe is a YAML file of a configuration's fields. The command line takes a built-in name or a
path, `--config tiny-sft`; a notebook takes `settings("tiny-sft", SFTConfig, output_dir=...)`.
"""

import difflib
import os
from dataclasses import fields
from importlib import resources

import yaml

from qlearn.errors import InputError


def names() -> list[str]:
    """The built-in recipes."""
    folder = resources.files(__name__)
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))


def read(recipe: str, config: type) -> dict:
    """The fields that a built-in recipe or a YAML file sets.

    Raises: InputError for a recipe that does not exist or is not YAML, or a key that `config` does
    not have, with the nearest one that it has.
    """
    if recipe in names():
        text = (resources.files(__name__) / f"{recipe}.yaml").read_text(encoding="utf-8")
    elif os.path.isfile(recipe):
        with open(recipe, encoding="utf-8") as file:
            text = file.read()
    else:
        raise InputError(
            f"There is no recipe {recipe}: it is neither a file nor one of {', '.join(names())}."
        )
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise InputError(f"{recipe}{line}: not valid YAML.") from error
    if not isinstance(found, dict):
        raise InputError(f"{recipe} must hold `key: value` lines.")
    valid = [f.name for f in fields(config)]
    settings = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in valid:
            (near,) = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
            raise InputError(f"{recipe}: unknown key {key!r}; the nearest valid key is {near!r}.")
        if value is not None:
            settings[name] = value
    return settings


def settings(recipe: str, config: type, **overrides):
    """A configuration from a recipe, with some fields set otherwise."""
    return config(**{**read(recipe, config), **overrides})
