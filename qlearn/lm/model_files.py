"""The files of a model's directory: which is damaged, and whose tokenizer belongs to it."""

import json
import os
import re
from collections.abc import Iterator
from glob import glob

import torch
import yaml

from qlearn.errors import InputError

JSON_FILES = re.compile(r"(config|generation_config|tokenizer\w*|vocab|.*\.index)\.json$")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip


def is_shape(name: str) -> bool:
    """Whether a model's name stands for a shape with random weights, not for files of its own."""
    return name == "tiny" or name.startswith("random:")


def damaged_file(folder: str) -> str | None:
    """What is wrong with the first damaged file of a model's directory, in words, or None."""
    names = [name for name in sorted(os.listdir(folder)) if JSON_FILES.match(name)]
    for path in (os.path.join(folder, name) for name in names):
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
        except (OSError, ValueError):
            return f"The file {path} is torn or empty: it is not JSON"
        if not isinstance(content, dict):
            return f"The file {path} is damaged: it holds no JSON object"
    for path in sorted(glob(os.path.join(folder, "*.safetensors"))):
        problem = _damaged_safetensors(path)
        if problem:
            return f"The file {path} {problem}"
    for path in sorted(glob(os.path.join(folder, "pytorch_model*.bin"))):
        try:
            torch.load(path, map_location="meta", weights_only=True)
        except Exception:  # pickle, zip and end-of-file errors
            return f"The file {path} is torn or empty: torch cannot read it"
    index = read_json(os.path.join(folder, "model.safetensors.index.json")) or {}
    for part in sorted(set((index.get("weight_map") or {}).values())):
        if not os.path.isfile(os.path.join(folder, part)):
            return f"The file {os.path.join(folder, part)}, one part of the weights, is not there"
    return None


def _damaged_safetensors(path: str) -> str | None:
    from safetensors import SafetensorError, safe_open

    size = os.path.getsize(path)
    if size == 0:
        return "is empty"
    with open(path, "rb") as file:
        if file.read(8) == b"version ":
            return "is a pointer of git-lfs, not the weights themselves (run git lfs pull)"
    try:
        with safe_open(path, framework="pt"):
            return None
    except (SafetensorError, OSError):
        return f"is torn: its {size} bytes are not what its header says"


def read_json(path: str) -> dict | None:
    """The object in a JSON file; None where there is no file, or no object in it."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


# --- whose tokenizer ---------------------------------------------------------------------------


def tokenizer_source(name: str) -> str:
    """Where the tokenizer of `name` is: `name` itself, or the base that its own files name.

    A directory of weights without tokenizer files may be an adapter (adapter_config.json names its
    base), a run of ours (qlearn.yaml names tokenizer and model) or a fine-tuned model (config.json
    has `_name_or_path`). transformers alone would make an empty tokenizer up.

    Raises: InputError where no file of the directory names a base.
    """
    visited = []
    while os.path.isdir(name) and not has_tokenizer(name):
        visited.append(os.path.abspath(name))
        base, file = next(_bases(name), (None, None))
        if base is None or os.path.abspath(base) in visited:
            raise InputError(
                f"The directory {name} holds no tokenizer, and no file in it names the model that "
                "it was made from; pass that model's tokenizer with --tokenizer."
            )
        print(f"note: {name} has no tokenizer of its own; using that of {base} (from {file}).")
        name = base
    return name


def has_tokenizer(folder: str) -> bool:
    """Whether a directory holds the files of a tokenizer."""
    there = os.listdir(folder)
    return any(file in TOKENIZER_FILES or file.endswith(".tiktoken") for file in there)


def _bases(folder: str) -> Iterator[tuple[str, str]]:
    """(base, the file that names it), the most telling first."""
    try:
        with open(os.path.join(folder, "qlearn.yaml"), encoding="utf-8") as file:
            run = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError):
        run = None
    named = (
        (run if isinstance(run, dict) else {}, "qlearn.yaml", ("tokenizer", "model")),
        (read_json(os.path.join(folder, "adapter_config.json")) or {}, "adapter_config.json",
         ("base_model_name_or_path",)),
        (read_json(os.path.join(folder, "config.json")) or {}, "config.json", ("_name_or_path",)),
    )  # fmt: skip
    for settings, file, keys in named:
        for key in keys:
            base = settings.get(key)
            if isinstance(base, str) and base and not is_shape(base):
                yield base, file
