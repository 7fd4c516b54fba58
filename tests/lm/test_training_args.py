"""TRL's training_args.bin is read and never run; an odd file is refused."""

import contextlib
import enum
import os
import pickle
import zipfile

import pytest
import torch

from qlearn.lm.training_args import describe, read_training_args


class DPOConfig:
    """Stands for TRL's class: a pickle holds its name and its settings."""

    def __init__(self, **settings):
        self.__dict__.update(settings)


class Command:
    """A pickle that makes a directory when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pack(path, pickled: bytes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("training_args/data.pkl", pickled)
    return str(path)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", ["sigmoid", "sft"]])
def test_claim_the_settings_are_those_that_were_saved(tmp_path, loss):
    settings = {"beta": 0.05, "loss_type": loss, "label_smoothing": 0.1, "seed": 2**40}
    path = str(tmp_path / "training_args.bin")
    torch.save(DPOConfig(**settings), path)
    assert read_training_args(path) == ("DPOConfig", settings)


def test_bug_a_hostile_pickle_does_nothing(tmp_path):
    target = tmp_path / "made"
    victims = {"bare": Command(target), "held": DPOConfig(beta=Command(target))}
    for name, victim in victims.items():
        path = pack(tmp_path / name, pickle.dumps(victim, protocol=2))
        with contextlib.suppress(ValueError):
            read_training_args(path)
        assert not target.exists()
    pickle.loads(pickle.dumps(Command(target)))
    assert target.exists()  # it would have


def test_bug_torn_and_swollen_files_are_refused(tmp_path):
    whole = tmp_path / "training_args.bin"
    torch.save(DPOConfig(beta=0.05), whole)
    contents = whole.read_bytes()
    for size in range(0, len(contents) - 1, 37):
        whole.write_bytes(contents[:size])
        with pytest.raises(ValueError, match="is not a readable"):
            read_training_args(str(whole))
    bomb = pack(tmp_path / "bomb.bin", b"\0" * 2**24)
    with pytest.raises(ValueError, match="is not a readable"):
        read_training_args(bomb)
    for pickled in (b"", b".", b"garbage", pickle.dumps([1]), pickle.dumps("text")):
        with pytest.raises(ValueError, match=r"not a readable|does not hold the settings"):
            read_training_args(pack(tmp_path / "odd.bin", pickled))


@pytest.mark.parametrize(
    "pickled",
    [b"\x85.",  # TUPLE1 of nothing
     b"K\x01\x86.",  # TUPLE2 of one number
     b"(\x85.",  # TUPLE1 of a mark
     b"(K\x01\x86.",  # TUPLE2 of a mark and a number
     b"K\x01(\x86."],
)  # fmt: skip
def test_claim_values_that_the_stack_does_not_hold_are_refused(pickled):
    """Too few of them, or a mark among them."""
    with pytest.raises(ValueError, match="The stack is too short"):
        describe(pickled)
    assert describe(b"K\x01K\x02\x86.") == (1, 2) and describe(b"(K\x01\x85t.") == ((1,),)


class Divergence(enum.Enum):
    REVERSE_KL = "reverse_kl"


def test_claim_a_member_of_an_enumeration_is_its_value(tmp_path):
    """As TRL's f_divergence_type; an object with settings of its own stays one."""
    path = str(tmp_path / "training_args.bin")
    torch.save(DPOConfig(f_divergence_type=Divergence.REVERSE_KL, inner=DPOConfig(beta=1)), path)
    name, settings = read_training_args(path)
    assert name == "DPOConfig" and settings["f_divergence_type"] == "reverse_kl"
    assert settings["inner"].state == {"beta": 1}
