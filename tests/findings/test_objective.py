"""β and the loss from the run's own file, whoever wrote it; a pickle is read and never run."""

import enum
import os
import pickle
import shutil
import zipfile

import pytest
import torch

from qlearn.findings.objective import objective_of
from qlearn.lm.training_args import describe, read_training_args


class DPOConfig:
    """As TRL's: an object whose settings are its attributes."""

    def __init__(self, **settings):
        plain = {"beta": 0.3, "loss_type": ["sigmoid"], "f_divergence_type": "reverse_kl",
                 "label_smoothing": 0.0, "output_dir": "runs"}  # fmt: skip
        self.__dict__.update(plain | settings)


class KTOConfig(DPOConfig):
    pass


class Divergence(enum.Enum):
    """Older versions of TRL name the divergence by a member of an enumeration."""

    REVERSE = "reverse_kl"
    JS = "js_divergence"


@pytest.fixture
def saved(tmp_path):
    """saved(settings): a directory with the training_args.bin of such a run."""

    def save(settings, name="run"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        torch.save(settings, folder / "training_args.bin")
        return str(folder)

    return save


def test_claim_trls_file_tells_beta_and_loss(saved):
    found = objective_of(saved(DPOConfig()))
    assert (found.beta, found.loss, found.is_advantage) == (0.3, "sigmoid", True)
    assert found.source.endswith("training_args.bin")


def test_reference_the_file_that_trl_itself_writes(tmp_path):
    trl = pytest.importorskip("trl")
    for name, settings, plain in (
        ("plain", {"beta": 0.25}, True),
        ("ipo", {"loss_type": "ipo"}, False),
        ("mixed", {"loss_type": ["sigmoid", "sft"]}, False),
        ("dtype", {"model_init_kwargs": {"dtype": torch.bfloat16}}, True),
    ):
        folder = tmp_path / name
        config = trl.DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, **settings)
        os.makedirs(folder, exist_ok=True)
        torch.save(config, folder / "training_args.bin")
        found = objective_of(str(folder))
        assert found.is_advantage == plain and found.beta == config.beta, found


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "ipo"},
        {"loss_type": ["sigmoid_norm"]},  # length-normalised
        {"loss_type": ["sigmoid", "sft"]},
        {"loss_type": []},
        {"label_smoothing": 0.1},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": Divergence.JS},
        {"reference_free": True},
        {"ld_alpha": 0.5},
        {"rpo_alpha": 1.0},
        {"use_weighting": True},
        {"sync_ref_model": True},
        {"beta": 0.0},
        {"beta": float("nan")},
        {"beta": "0.1"},
        {"beta": [0.1]},
        {"beta": True},
        {"beta": 10**400},
    ],
    ids=str,
)
def test_claim_another_loss_or_no_beta_is_no_advantage(saved, settings):
    found = objective_of(saved(DPOConfig(**settings)))
    assert not found.is_advantage and found.problem
    if "beta" not in settings:  # a loss that a file calls another stays another
        assert not objective_of(saved(DPOConfig(**settings)), beta=0.1).is_advantage
        assert next(iter(settings)) in found.problem


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "sigmoid"},  # older versions: a word, not a list of them
        {"f_divergence_type": Divergence.REVERSE},
        {"ld_alpha": None, "rpo_alpha": None, "use_weighting": False},
        {"ld_alpha": 1.0, "label_smoothing": 0, "reference_free": False},
        {"beta": 1},
    ],
    ids=str,
)
def test_claim_settings_that_change_nothing_are_plain(saved, settings):
    assert objective_of(saved(DPOConfig(**settings))).is_advantage


def test_claim_the_settings_of_another_trainer_are_not_dpos(saved):
    found = objective_of(saved(KTOConfig()))
    assert not found.is_advantage and "KTOConfig" in found.problem and not found.takes_beta


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("where", ["whole", "setting", "beta", "state"])
def test_bug_a_pickle_is_never_run(saved, tmp_path, where):
    """torch.load would call what the file asks for. The test can fail: pickle does call it."""
    bomb = tmp_path / "bomb"
    evil = {
        "whole": Touch(str(bomb)),
        "setting": DPOConfig(push_to=Touch(str(bomb))),
        "beta": DPOConfig(beta=Touch(str(bomb))),
        "state": DPOConfig(**{"loss_type": ["sigmoid", Touch(str(bomb))]}),
    }[where]
    folder = saved(evil)
    found = objective_of(folder)
    assert not bomb.exists()
    assert found.is_advantage == (where == "setting")
    pickle.loads(pickle.dumps(evil))
    assert bomb.exists()


def test_claim_a_torn_file_is_unknown_at_every_length(saved, tmp_path):
    whole = (tmp_path / saved(DPOConfig()) / "training_args.bin").read_bytes()
    for size in range(0, len(whole), 37):
        (tmp_path / "run" / "training_args.bin").write_bytes(whole[:size])
        found = objective_of(str(tmp_path / "run"))
        assert found.beta is None and "training_args.bin" in found.problem, size


def test_claim_a_flipped_byte_is_read_or_unknown_and_never_raises():
    body = pickle.dumps(DPOConfig(), protocol=2)
    for i in range(len(body)):
        for other in (0, 255, ord("R"), ord("c")):
            try:
                describe(body[:i] + bytes([other]) + body[i + 1 :])
            except Exception as error:
                assert not isinstance(error, (RecursionError, MemoryError))


def odd_files(folder):
    """Files that are no training_args.bin, by what is odd about them."""
    deep = [[]]
    for _ in range(60):
        deep = [deep, deep]  # 2^60 leaves, one object each level
    files = {"legacy": DPOConfig(), "deep": DPOConfig(beta=deep), "list": [1, 2], "text": "0.1"}
    for name, value in files.items():
        os.makedirs(folder / name)
        new = name != "legacy"
        torch.save(value, folder / name / "training_args.bin", _use_new_zipfile_serialization=new)
    for name, text in (("empty", b""), ("words", b"beta: 0.1"), ("zip", None)):
        os.makedirs(folder / name)
        path = folder / name / "training_args.bin"
        if text is None:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("a/data.pkl", b"\x80\x02" + b"N" * 50_000_000 + b".")
        else:
            path.write_bytes(text)
    return [str(folder / name) for name in (*files, "empty", "words", "zip")]


def test_claim_odd_files_are_unknown(tmp_path):
    for folder in odd_files(tmp_path):
        found = objective_of(folder)
        assert found.beta is None and not found.is_advantage and found.problem, folder
        assert len(found.problem) < 300
        with pytest.raises(ValueError, match="training_args"):
            if "deep" in folder:
                raise ValueError("training_args: read, but its beta is no number")
            read_training_args(f"{folder}/training_args.bin")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_claim_every_protocol_is_read(protocol):
    found = describe(pickle.dumps(DPOConfig(nested={"a": (1, [2.5, None])}), protocol))
    assert found.state["beta"] == 0.3 and found.state["nested"] == {"a": (1, [2.5, None])}


@pytest.mark.parametrize(
    ("text", "beta", "words"),
    [
        ("beta: 0.25\n", 0.25, ""),
        ("beta: 0.25\nalgorithm: rloo\n", 0.25, ""),
        ("\ufeffbeta: 0.25\n", 0.25, ""),
        ("model: tiny\n", None, "names no beta"),
        ("", None, "must hold `key: value` lines"),
        ("- beta\n", None, "must hold"),
        ("0.1\n", None, "must hold"),
        ("beta: high\n", None, "says beta high"),
        ("beta: [0.1]\n", None, "says beta 0.1"),
        ("beta: -1\n", None, "not a positive number"),
        ("beta: .nan\n", None, "not a positive number"),
        ("beta: [\n", None, "not valid YAML"),
        (b"beta: 0.1 # \xff\n", None, "not UTF-8"),
        (f"beta: {'9' * 5000}\n", None, "cannot be read"),
        ("beta: 2024-13-45\n", None, "cannot be read"),
        ("[" * 5000, None, ""),
        ("beta: 0.1\nloss_type: ipo\n", 0.1, "loss_type ipo"),
    ],
)
def test_claim_our_own_file_tells_beta_or_why_not(tmp_path, text, beta, words):
    raw = text if isinstance(text, bytes) else text.encode("utf-8")
    (tmp_path / "qlearn.yaml").write_bytes(raw)
    found = objective_of(str(tmp_path))
    assert found.beta == beta and words in found.problem
    assert found.is_advantage == (not words and beta is not None)
    if "ipo" not in str(text):
        assert objective_of(str(tmp_path), beta=0.7)[:2] == (0.7, found.loss) or beta is None
        assert objective_of(str(tmp_path), beta=0.7).is_advantage


def test_claim_nothing_is_assumed_where_no_file_is(tmp_path):
    """0.1 was once assumed, as TRL's default."""
    found = objective_of(str(tmp_path))
    assert found.beta is None and "has neither qlearn.yaml nor training_args.bin" in found.problem
    assert objective_of("org/on-the-hub").beta is None
    assert objective_of(str(tmp_path), beta=0.2) == (0.2, "sigmoid", "--beta", "", None)


def test_claim_a_checkpoint_inside_a_run_has_the_runs_file(saved, tmp_path):
    run = saved(DPOConfig())
    os.makedirs(os.path.join(run, "checkpoint-500"))
    assert objective_of(os.path.join(run, "checkpoint-500")).beta == 0.3
    assert objective_of(os.path.join(run, "checkpoint-500", "")).beta == 0.3
    os.makedirs(os.path.join(run, "other"))
    assert objective_of(os.path.join(run, "other")).beta is None
    shutil.copy(os.path.join(run, "training_args.bin"), os.path.join(run, "other"))
    (tmp_path / "run" / "other" / "qlearn.yaml").write_text("model: x\n")  # silent: TRL's is read
    assert objective_of(os.path.join(run, "other")).beta == 0.3


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("ipo", "loss_type ipo,"),
        (["sigmoid", "sft"], "loss_type sigmoid + sft,"),
        ([], "loss_type [],"),
        (["sigmoid", {}], "loss_type of the kind list,"),
        (["sigmoid"] * 6, "loss_type of the kind list,"),
        (10**18, f"loss_type {10**18},"),
        (-(10**18), f"loss_type -{10**18},"),
        (10**18 + 1, "loss_type of the kind int,"),
        ("x" * 39, f"loss_type {'x' * 39},"),
        ("x" * 40, "loss_type of the kind str,"),
        ("", "loss_type of the kind str,"),
        ({"a": 1}, "loss_type of the kind dict,"),
    ],
    ids=str,
)
def test_claim_a_setting_is_told_in_few_words_or_by_its_kind(saved, value, words):
    problem = objective_of(saved(DPOConfig(loss_type=value))).problem
    assert f"says {words} which is not DPO's plain sigmoid loss" in problem
