"""The hub's answer, its silence and its absence, without a network: one fake session for each."""

import threading
import time
from types import SimpleNamespace

import datasets
import pytest
from huggingface_hub import constants

from qlearn.errors import InputError
from qlearn.lm import hub, rows
from qlearn.lm.pretrained import from_pretrained


@pytest.fixture
def session(monkeypatch):
    """session(head): the hub asked anew, by `head(address, timeout=...)`; and nothing offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def ask(head):
        monkeypatch.setattr(hub.huggingface_hub, "get_session", lambda: SimpleNamespace(head=head))
        return hub.can_be_reached.__wrapped__()

    return ask


def offline():
    return constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE


def test_claim_a_hub_that_answers_is_reached_by_one_short_request(session):
    """At the hub's own address, in half of the time, in a thread that no exit waits for."""
    asked = []

    def head(address, timeout):
        asked.append((address, timeout, threading.current_thread().daemon))

    assert session(head) is True
    assert asked == [(constants.ENDPOINT, 2.0, True)] and hub.SECONDS == 4.0
    assert offline() == (False, False)


def test_claim_a_hub_that_fails_leaves_its_libraries_offline(session):
    def head(address, timeout):
        raise ConnectionError("no route")

    assert session(head) is False and offline() == (True, True)


def test_claim_nobody_waits_for_a_silent_hub(session, monkeypatch):
    monkeypatch.setattr(hub, "SECONDS", 0.1)
    never, start = threading.Event(), time.perf_counter()
    assert session(lambda address, timeout: never.wait(20)) is False
    assert time.perf_counter() - start < 5 and offline() == (True, True)
    never.set()


def test_claim_the_reason_says_whose_choice_it_was(monkeypatch):
    monkeypatch.setattr(hub, "OFFLINE_BY_CHOICE", True)
    assert hub.reason() == "HF_HUB_OFFLINE is set, so the hub is not asked"
    monkeypatch.setattr(hub, "OFFLINE_BY_CHOICE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub")
    assert hub.reason() == "the hub at https://hub cannot be reached"


class Loader:
    """Stands for AutoModel: reads nothing."""

    @staticmethod
    def from_pretrained(name, **options):
        raise OSError("no such repository")


@pytest.mark.parametrize("reached", [True, False])
def test_claim_the_reason_is_the_hubs_own_where_it_answered(reached, monkeypatch):
    """Of a model and of rows: what the hub said, or why it was not asked."""
    monkeypatch.setattr(hub, "can_be_reached", lambda: reached)
    monkeypatch.setattr(hub, "reason", lambda: "away")
    monkeypatch.setattr(datasets, "load_dataset", Loader.from_pretrained)
    sentence = r"\(no such repository\)\.$" if reached else r"\(away\)\.$"
    with pytest.raises(InputError, match=f"Could not read the model 'org/name' .*{sentence}"):
        from_pretrained(Loader, "org/name", "model")
    with pytest.raises(InputError, match=f"Could not read 'org/name:test' .*{sentence}"):
        rows.read_rows("org/name:test", ("prompt",))


def test_claim_a_directory_is_read_without_asking_the_hub(monkeypatch, tmp_path):
    def asked():
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "can_be_reached", asked)
    with pytest.raises(InputError, match="holds no model that transformers can read: no such repo"):
        from_pretrained(Loader, str(tmp_path), "model")


def test_claim_rows_of_the_hub_are_those_of_the_split_and_numbered_from_one(monkeypatch):
    monkeypatch.setattr(hub, "can_be_reached", lambda: True)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: [{"prompt": name}, {"prompt": split}]
    )
    for source, split in (("org/name", "train"), ("org/name:test[:5]", "test[:5]")):
        assert rows.read_rows(source, ("prompt",)) == [
            (1, {"prompt": "org/name"}), (2, {"prompt": split}),
        ]  # fmt: skip
