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
        path = str(resources.files(__name__) / f"{recipe}.yaml")
    elif os.path.isfile(recipe):
        path = recipe
    else:
        raise InputError(
            f"There is no recipe {recipe!r}: it is neither a file nor one of {', '.join(names())}."
        )
    valid = [f.name for f in fields(config)]
    settings = {}
    for key, value in read_yaml(path).items():
        name = str(key).replace("-", "_")
        if name not in valid:
            (near,) = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
            raise InputError(f"{recipe}: unknown key {key!r}; the nearest valid key is {near!r}.")
        if name in settings:
            raise InputError(f"{recipe} sets {name} twice; leave one of them out.")
        if isinstance(value, (dict, list, set)):
            raise InputError(
                f"{recipe}: {key} holds a {type(value).__name__}; write one value behind it."
            )
        if value is not None:
            settings[name] = value
    return settings


def read_yaml(path: str) -> dict:
    """The `key: value` lines of a YAML file.

    Raises: InputError for a file that cannot be read, is not UTF-8 or not YAML, holds no such lines
    or sets a key twice.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        found = yaml.safe_load(text)
        keys = _keys(yaml.compose(text, yaml.SafeLoader))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise InputError(f"{path}{line}: not valid YAML; write `key: value` lines.") from error
    except (ValueError, RecursionError) as error:  # a date that is none, 5,000 digits, 1,000 lists
        raise InputError(f"{path}: a value in it cannot be read; write plain ones.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold `key: value` lines.")
    again = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
    if again is not None:  # YAML would keep the last without a word
        raise InputError(f"{path} sets {again} twice; leave one of them out.")
    return found


def _keys(node: yaml.Node | None) -> list[str]:
    """The keys of a YAML document as they were written, those that it sets twice twice."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return [str(key.value) for key, _ in pairs]


def settings(recipe: str, config: type, **overrides):
    """A configuration from a recipe, with some fields set otherwise."""
    return config(**{**read(recipe, config), **overrides})
