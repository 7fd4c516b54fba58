"""Trained runs that nobody trains: what a study asks for is kept, what it reads is made up."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from qlearn.studies import runs


@pytest.fixture
def made(tmp_path, monkeypatch):
    """{folder: settings} of every run asked for; folders are named sft-0, dpo-1 and so on.

    The same settings give the same folder. It holds the settings and nothing else. Seeds are
    measured one after another in this process.
    """
    asked = {}

    def trained(run, config):
        kind = run.__module__.rsplit(".", 1)[-1]
        for folder, known in asked.items():
            if known == config:
                return folder
        folder = tmp_path / f"{kind}-{len(asked)}"
        folder.mkdir()
        text = yaml.safe_dump(dataclasses.asdict(config))
        (folder / "qlearn.yaml").write_text(text, encoding="utf-8")
        asked[str(folder)] = config
        return str(folder)

    monkeypatch.setattr(runs, "FOLDER", Path(tmp_path, "runs"))
    monkeypatch.setattr(runs, "trained", trained)
    monkeypatch.setattr(runs, "each_seed", lambda measure, seeds: [measure(x) for x in seeds])
    return asked


@pytest.fixture
def by_name(monkeypatch):
    """by_name(study): its models and tokenizers are the names of their folders."""

    def patch(study):
        monkeypatch.setattr(study, "load_tokenizer", lambda folder: f"tokenizer of {folder}")
        monkeypatch.setattr(study, "load_model", lambda folder, tokenizer: (folder, tokenizer))

    return patch
