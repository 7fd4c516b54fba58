"""Checkpoints that are not what they seem: weights missing, torn, wrapped, or of another model."""

import json
import os
import re
import shutil
from glob import glob

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from qlearn import cli
from qlearn.errors import InputError
from qlearn.lm import model_files, pretrained
from qlearn.lm.model_files import damaged_file, tokenizer_source
from qlearn.lm.models import load_model, note_if_surprised
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.train.reward import load_reward_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def saved(save_models, tmp_path):
    """A directory with a tiny model and its tokenizer."""
    return save_models(tmp_path, policy=1) / "policy"


def rewrite(folder, change) -> None:
    """Saves the weights {name: tensor} of a directory as `change` makes them."""
    path = folder / WEIGHTS
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def renamed(prefix):
    return lambda weights: {prefix + name: x for name, x in weights.items()}


# --- missing and surplus weights ---------------------------------------------------------------


MISSING = {
    "no head": (
        lambda weights: {k: x for k, x in weights.items() if not k.startswith("embed_out")},
        r"lacks (lm_head|embed_out)\.weight, which would be random; save the whole model",
    ),
    "no layer": (
        lambda weights: {k: x for k, x in weights.items() if ".layers.1." not in k},
        r"lacks .*layers\.1\..* and \d+ more, which would be random",
    ),
    "another prefix": (
        renamed("backbone."),
        r"its weights stand under the prefix 'backbone'.*save_pretrained",
    ),
    "TRL's value head": (
        lambda weights: renamed("pretrained_model.")(weights)
        | {"v_head.summary.weight": torch.zeros(1, 64)},
        "its weights stand under the prefix 'pretrained_model'",
    ),
    "a surplus layer": (
        lambda weights: weights
        | {k.replace(".1.", ".2."): x.clone() for k, x in weights.items() if ".layers.1." in k},
        "has weights that its config.json has no place for, .*layers.2",
    ),
    "other sizes": (
        lambda weights: weights | {"gpt_neox.final_layer_norm.weight": torch.ones(32)},
        r"final_layer_norm.weight has the sizes \(32,\) where the configuration asks for \(64,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MISSING)
def test_bug_weights_that_a_checkpoint_lacks_are_never_random(what, saved, tokenizer):
    change, sentence = MISSING[what]
    rewrite(saved, change)
    with pytest.raises(InputError, match=sentence) as caught:
        load_model(str(saved), tokenizer)
    assert str(saved) in str(caught.value) and str(caught.value).endswith(".")


def test_bug_a_reward_model_is_no_policy_and_a_policy_no_reward_model(saved, tokenizer, tmp_path):
    """Each would have scored with a head of random numbers."""
    judge = tmp_path / "judge"
    AutoModelForSequenceClassification.from_pretrained(saved, num_labels=1).save_pretrained(judge)
    tokenizer.save_pretrained(judge)
    with pytest.raises(InputError, match="it is a reward model or classifier"):
        load_model(str(judge), tokenizer)
    with pytest.raises(InputError, match="it is a language model; `qlearn reward` makes"):
        load_reward_model(str(saved), tokenizer)


def test_claim_a_classifier_of_three_labels_is_no_reward_model(saved, tokenizer, tmp_path):
    judge = tmp_path / "judge"
    AutoModelForSequenceClassification.from_pretrained(saved, num_labels=3).save_pretrained(judge)
    tokenizer.save_pretrained(judge)
    with pytest.raises(InputError, match="a classifier of 3 labels, not a reward model"):
        load_reward_model(str(judge), tokenizer)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_claim_compiled_and_parallel_checkpoints_are_read_under_their_own_names(
    prefix, saved, tokenizer, capsys
):
    expected = load_model(str(saved), tokenizer).state_dict()
    rewrite(saved, renamed(prefix))
    found = load_model(str(saved), tokenizer).state_dict()
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert f"{prefix!r} is left out" in capsys.readouterr().out


def test_claim_a_value_head_beside_a_whole_model_is_said_and_old_buffers_are_not(
    saved, tokenizer, capsys
):
    expected = load_model(str(saved), tokenizer).state_dict()
    old = {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
           "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
           "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4)}  # fmt: skip
    rewrite(saved, lambda weights: weights | old)
    load_model(str(saved), tokenizer)
    assert capsys.readouterr().out == ""
    rewrite(saved, lambda weights: weights | {"v_head.summary.weight": torch.zeros(1, 64)})
    found = load_model(str(saved), tokenizer).state_dict()
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert "has a value head beside its language model" in capsys.readouterr().out


def test_claim_tied_tables_are_not_missing(tokenizer, tmp_path):
    """GPT-2's head is its embedding, saved once."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    model = load_model(str(tmp_path), tokenizer)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_claim_an_adapter_without_its_library_is_refused(tokenizer, saved, tmp_path, monkeypatch):
    """Also beside a whole base, whose weights alone are another model."""
    monkeypatch.setattr("qlearn.lm.pretrained.is_peft_available", lambda: False)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    for folder in (tmp_path / "adapter", saved):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
        with pytest.raises(InputError, match=r"adapter to org/base.*pip install peft"):
            load_model(str(folder), tokenizer)


# --- damaged files -----------------------------------------------------------------------------


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "torn": (WEIGHTS, half, f"{WEIGHTS} is torn"),
    "a header alone": (WEIGHTS, lambda p: p.write_bytes(p.read_bytes()[:40]), f"{WEIGHTS} is torn"),
    "empty": (WEIGHTS, lambda p: p.write_bytes(b""), f"{WEIGHTS} is empty"),
    "text": (WEIGHTS, lambda p: p.write_text("404: not found"), f"{WEIGHTS} is torn"),
    "too long": (WEIGHTS, lambda p: p.write_bytes(p.read_bytes() + b"x" * 9), f"{WEIGHTS} is torn"),
    "a git-lfs pointer": (WEIGHTS, lambda p: p.write_text("version https://git-lfs.github.com/"),
                          "pointer of git-lfs.*git lfs pull"),
    "torn config": ("config.json", half, "config.json is torn or empty"),
    "empty config": ("config.json", lambda p: p.write_text(""), "config.json is torn or empty"),
    "torn tokenizer": ("tokenizer.json", half, "tokenizer.json is torn or empty"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_claim_damaged_files_are_named_from_the_command_line(what, saved, capsys, tmp_path):
    name, damage, sentence = DAMAGE[what]
    damage(saved / name)
    code = cli.main(["inspect", "--policy", str(saved), "--reference", str(saved), "--prompt", "a",
                     "--response", " b", "--html", str(tmp_path / "page.html")])  # fmt: skip
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1, error

    assert re.search(sentence, error) and str(saved) in error, error


def test_claim_a_missing_part_of_the_weights_is_named(saved, tokenizer):
    shutil.move(saved / WEIGHTS, saved / "model-00001-of-00002.safetensors")
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": parts}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"00002-of-00002\.safetensors, one part of the weights"):
        load_model(str(saved), tokenizer)


# --- whose tokenizer ---------------------------------------------------------------------------


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return folder


def test_claim_a_directory_without_tokenizer_is_opened_by_the_base_that_it_names(
    save_models, tmp_path, capsys
):
    folder = save_models(tmp_path, base=1, tuned=2)
    tuned = without_tokenizer(folder / "tuned")
    with pytest.raises(InputError, match=r"holds no tokenizer.*with --tokenizer"):
        load_tokenizer(str(tuned))
    expected = load_tokenizer(str(folder / "base")).get_vocab()
    sources = {
        "qlearn.yaml": f"model: {folder / 'base'}\n",
        "adapter_config.json": json.dumps({"base_model_name_or_path": str(folder / "base")}),
    }
    for name, text in sources.items():
        (tuned / name).write_text(text)
        assert load_tokenizer(str(tuned)).get_vocab() == expected
        assert f"using that of {folder / 'base'} (from {name})" in capsys.readouterr().out
        (tuned / name).unlink()


def test_claim_directories_that_name_each_other_end(save_models, tmp_path):
    folder = save_models(tmp_path, one=1, two=2)
    for name, other in (("one", "two"), ("two", "one")):
        without_tokenizer(folder / name)
        (folder / name / "qlearn.yaml").write_text(f"model: {folder / other}\n")
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(str(folder / "one"))


def test_claim_a_tokenizer_that_is_not_the_models_is_noticed(saved, tokenizer, capsys):
    """Rows that a trained model finds less likely than an even guess: ids of another meaning."""
    model = load_model(str(saved), tokenizer)
    with torch.no_grad():  # a model that is sure of its next token, token 5
        model.get_output_embeddings().weight.zero_()
        model.base_model.final_layer_norm.bias.fill_(1.0)
        model.get_output_embeddings().weight[5] = 1.0
    note_if_surprised(model, [([1], [5, 5, 5])], str(saved))
    assert capsys.readouterr().out == ""
    note_if_surprised(model, [([1], [6, 7, 8])], str(saved))
    assert "nats a token where an even guess has 5.4" in capsys.readouterr().out
    note_if_surprised(model, [([1], [6, 7, 8])], "tiny")
    assert capsys.readouterr().out == ""


def test_claim_the_surprise_is_the_mean_of_sixteen_rows(saved, tokenizer, capsys):
    """Nats over all their tokens: 15 of 64 and 3 of 0, so 53.3; what stands behind is not read."""
    model = load_model(str(saved), tokenizer)
    with torch.no_grad():  # logits 64 for token 5 and 0 for all others, after any prompt
        model.base_model.final_layer_norm.weight.zero_()
        model.base_model.final_layer_norm.bias.fill_(1.0)
        model.get_output_embeddings().weight.zero_()
        model.get_output_embeddings().weight[5] = 1.0
    rows = [([1], [6])] * 13 + [([1, 2], [5])] * 2 + [([3], [6, 6, 5])]
    for more in ([], [([1], [5] * 50)]):
        note_if_surprised(model, rows + more, str(saved))
        sentence = "finds the rows unlikely, 53.3 nats a token where an even guess has 5.4;"
        assert sentence in capsys.readouterr().out
    note_if_surprised(model, [], str(saved))
    assert capsys.readouterr().out == ""


class Command:
    """A pickle that makes a directory when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_bug_no_pickle_of_a_checkpoint_is_run_to_see_whether_it_is_whole(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert damaged_file(str(tmp_path)) is None
    torch.save(Command(str(tmp_path / "made")), tmp_path / "pytorch_model.bin")
    assert "torch cannot read it" in damaged_file(str(tmp_path))
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "made").exists()  # it would have


@pytest.mark.parametrize("pattern", ["{}.json", "model-{}.safetensors", "pytorch_model-{}.bin"])
def test_claim_the_first_damaged_file_is_the_first_by_name(pattern, tmp_path, monkeypatch):
    """Whatever order the file system lists them in."""
    names = ("config", "tokenizer", "vocab") if ".json" in pattern else ("1", "2", "3")
    for name in names:
        (tmp_path / pattern.format(name)).write_text("")
    first = str(tmp_path / pattern.format(names[0]))
    for order in (sorted, lambda found: sorted(found, reverse=True)):
        monkeypatch.setattr(model_files, "glob", lambda text, order=order: order(glob(text)))
        with monkeypatch.context() as patch:
            listed = [pattern.format(name) for name in order(names)]
            patch.setattr(model_files.os, "listdir", lambda folder, listed=listed: listed)
            assert damaged_file(str(tmp_path)).startswith(f"The file {first} ")


def test_claim_a_config_may_name_the_base_whose_tokenizer_it_is(save_models, tmp_path, capsys):
    """As transformers writes it; a shape's name, "tiny", is none."""
    folder = save_models(tmp_path, base=1, tuned=2)
    config = without_tokenizer(folder / "tuned") / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"_name_or_path": str(folder / "base")}))
    assert tokenizer_source(str(folder / "tuned")) == str(folder / "base")
    assert f"using that of {folder / 'base'} (from config.json)" in capsys.readouterr().out
    config.write_text(json.dumps(settings | {"_name_or_path": "tiny"}))
    with pytest.raises(InputError, match="holds no tokenizer"):
        tokenizer_source(str(folder / "tuned"))


# --- which sentence a checkpoint's names get -----------------------------------------------------


def test_claim_a_wrapped_checkpoint_may_have_a_value_head_beside_it(saved, tokenizer, capsys):
    """Its head is not under the wrapper's prefix, and the model is read all the same."""
    expected = load_model(str(saved), tokenizer).state_dict()
    head = {"v_head.summary.weight": torch.zeros(1, 64)}
    rewrite(saved, lambda weights: renamed("module.")(weights) | head)
    found = load_model(str(saved), tokenizer).state_dict()
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    out = capsys.readouterr().out
    assert "'module.' is left out" in out and "has a value head beside" in out


def test_claim_a_whole_checkpoint_is_not_read_under_other_names(saved, tokenizer, capsys):
    """A weight too many is named as it stands in the file, though it begins as a wrapper's do."""
    rewrite(saved, lambda weights: weights | {"module.more": torch.zeros(1)})
    with pytest.raises(InputError, match=r"has no place for, module\.more; leaving them out"):
        load_model(str(saved), tokenizer)
    assert capsys.readouterr().out == ""


def test_claim_of_several_sizes_that_do_not_fit_the_first_by_name_is_told():
    wrong = [("b.weight", (3,), (4,)), ("a.weight", (1, 2), (5, 6)), ("c", (1,), (2,))]
    report = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": wrong}
    sentence = r"a.weight has the sizes \(1, 2\) where the configuration asks for \(5, 6\)"
    with pytest.raises(InputError, match=sentence):
        pretrained._check_report(report, "x", "language model")


@pytest.mark.parametrize(
    ("keys", "names"),
    [("a", "a"), ("abc", "a, b, c"), ("abcd", "a, b, c and 1 more"),
     ("abcdef", "a, b, c and 3 more")],
)  # fmt: skip
def test_claim_three_names_are_shown_and_the_others_counted(keys, names):
    assert pretrained._names(list(keys)) == names


@pytest.mark.parametrize(
    ("unexpected", "remedy"),
    [
        ([], "save the whole model, its head included, or pass another"),
        (["a.x"], "save the whole model, its head included, or pass another"),
        (["a.x", "b.y"], "save the whole model, its head included, or pass another"),
        (["a.x", "v_head.w"], "save the whole model, its head included, or pass another"),
        (["a.x", "a.y"], "under the prefix 'a', so save the model inside the wrapper"),
        (["a.x", "a.y", "v_head.w"], "under the prefix 'a', so save the model inside the wrapper"),
        (["a.x", "score.weight"], "so pass the language model it was trained from"),
        (["a.x", "lm_head.weight"], "`qlearn reward` makes a reward model of it"),
        (["a.x", "a.lora_A.weight"], "so merge it into its base and save that"),
    ],
)
def test_claim_what_to_do_follows_from_the_names_that_are_there(unexpected, remedy):
    assert remedy in pretrained._remedy(unexpected)


def test_claim_buffers_of_older_versions_are_no_weights_too_many():
    """Of any architecture, where transformers itself reports them; a weight beside them is told."""
    names = ("inv_freq", "masked_bias", "attn.bias", "attention.bias", "causal_mask",
             "cos_cached", "sin_cached", "position_ids")  # fmt: skip
    buffers = [f"h.0.{name}" for name in names]
    report = {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": buffers}
    pretrained._check_report(report, "x", "language model")
    report["unexpected_keys"] = [*buffers, "h.0.attn.bias.weight"]
    with pytest.raises(InputError, match=r"no place for, h\.0\.attn\.bias\.weight; leaving"):
        pretrained._check_report(report, "x", "language model")


def test_claim_transformers_says_as_much_after_a_model_was_read_as_before(saved, tokenizer):
    before = logging.get_verbosity()
    try:
        for level in (logging.INFO, logging.ERROR):
            logging.set_verbosity(level)
            load_model(str(saved), tokenizer)
            assert logging.get_verbosity() == level
    finally:
        logging.set_verbosity(before)
