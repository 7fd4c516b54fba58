"""Small models and rows that many tests share."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the hub

import pytest
import torch

from qlearn.lm.models import load_model
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.lm.worlds import SlotWorld

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("slots")


@pytest.fixture
def model(tokenizer):
    return load_model("tiny", tokenizer, seed=1)


@pytest.fixture
def other(tokenizer):
    return load_model("tiny", tokenizer, seed=2)


@pytest.fixture(scope="session")
def save_models(tokenizer):
    """save_models(folder, name=seed, ...): tiny models in folder/name, each with its tokenizer."""

    def save(folder, **seeds):
        for name, seed in seeds.items():
            load_model("tiny", tokenizer, seed).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        return folder

    return save


@pytest.fixture(scope="session")
def preference_rows():
    """64 pairs in the embedded world: two lines by the writers, the better one chosen."""
    world = SlotWorld()
    one, two = world.sft_rows(64, "a"), world.sft_rows(64, "a2")
    rows = []
    for first, second in zip(one, two, strict=True):
        rows.append(
            {"prompt": first["prompt"], "chosen": first["completion"],
             "rejected": second["completion"]}
        )  # fmt: skip
    return rows


@pytest.fixture
def write_jsonl(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(path)

    return write
