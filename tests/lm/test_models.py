"""Models and tokenizers: shapes, precision, what is refused."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM

from qlearn.errors import InputError
from qlearn.lm.models import (
    SHAPES,
    _check_body_and_head,
    config_of,
    explain_table_sizes,
    load_model,
)
from qlearn.lm.tokenizers import load_tokenizer
from tests.families import FAMILIES

PARAMETERS = {  # as published for Pythia, with the 50,304 rows of its tables
    "pythia-14m": 14_067_712,
    "pythia-31m": 30_494_720,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_claim_shapes_have_pythias_parameter_counts(name, tokenizer):
    """Each shape has exactly the published number of parameters (built without memory)."""
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config_of(SHAPES[name], tokenizer))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_claim_config_is_pythias(tokenizer):
    """Trap 9: end of text is id 0, the vocabulary 50,304, rotary on a quarter, nothing tied."""
    config = config_of(SHAPES["pythia-14m"], tokenizer)
    assert (config.eos_token_id, config.bos_token_id, config.vocab_size) == (0, 0, 50_304)
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    assert config.use_parallel_residual and not config.tie_word_embeddings


def test_claim_same_seed_same_weights(tokenizer):
    """And the global random state stays as it was."""
    before = torch.get_rng_state()
    one, two, three = (load_model("tiny", tokenizer, seed=s).state_dict() for s in (5, 5, 6))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], three[k]) for k in one)
    assert torch.equal(before, torch.get_rng_state())


def test_claim_half_precision_checkpoints_load_as_float32(model, tokenizer, tmp_path):
    """Traps 10 and 15: Pythia is stored in float16; training in it would lose small steps."""
    model.half().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float16
    loaded = load_model(str(tmp_path), tokenizer)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_claim_dropout_is_off_even_in_training_mode(tokenizer, tmp_path):
    """Trap 22: a checkpoint with dropout 0.5 gives the same logits twice in train mode."""
    config = config_of(SHAPES["tiny"], tokenizer)
    config.hidden_dropout = config.attention_dropout = 0.5
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), tokenizer).train()
    assert any(isinstance(m, nn.Dropout) for m in model.modules())
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_claim_tokenizer_round_trip(tokenizer, preference_rows):
    """Trap 10: text survives tokenising, and no word of the world is unknown to it."""
    for row in preference_rows:
        for text in row.values():
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text.strip()


def test_claim_world_tokenizer_survives_saving(tokenizer, tmp_path):
    """A run's folder holds all that is needed to read it again."""
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.eos_token_id, again.pad_token_id) == (0, 1)


def test_claim_lone_tokenizer_json_is_enough(tokenizer, tmp_path):
    """A directory with tokenizer.json alone: Pythia's special tokens are found by name."""
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    again = load_tokenizer(str(tmp_path))
    assert (again.eos_token_id, again.pad_token_id) == (0, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_claim_a_tokenizer_stays_as_it_came_in(family, tmp_path):
    """No padding token is made up: "!" (id 0 of GPT-2) stays an ordinary word, in what is saved."""
    tokenizer = FAMILIES[family]()
    tokenizer.save_pretrained(tmp_path / "a")
    load_tokenizer(str(tmp_path / "a")).save_pretrained(tmp_path / "b")
    again = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.get_vocab() == tokenizer.get_vocab()
    ids = tokenizer("No! Really!").input_ids
    assert again("No! Really!").input_ids == ids
    assert again.decode(ids, skip_special_tokens=True).strip() == "No! Really!"


def test_claim_unknown_names_are_explained(tokenizer, tmp_path):
    cases = {
        "random:pythia-3b": "There is no shape 'pythia-3b'; choose one of tiny",
        "nobody/nothing": "pass the path of a local directory",
        str(tmp_path): "holds no language model",
    }
    for name, sentence in cases.items():
        with pytest.raises(InputError, match=sentence):
            load_model(name, tokenizer)
    with pytest.raises(InputError, match="pass the path of a local directory"):
        load_tokenizer("nobody/nothing")


def test_claim_padded_tables_are_lawful_and_explained(model, tokenizer, capsys):
    explain_table_sizes(model, model, "reference")
    assert capsys.readouterr().out == ""
    big = GPTNeoXForCausalLM(config_of(SHAPES["tiny"], tokenizer))
    big.resize_token_embeddings(len(tokenizer) + 8)
    explain_table_sizes(model, big, "reference")
    assert "the policy has 224 rows for tokens and the reference 232" in capsys.readouterr().out


def test_claim_a_model_smaller_than_its_tokenizer_is_refused(model, tokenizer, tmp_path):
    model.resize_token_embeddings(50)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="pass the tokenizer that belongs to the model"):
        load_model(str(tmp_path), tokenizer)


def test_claim_a_head_that_bends_its_logits_is_refused(tokenizer, tmp_path):
    """Gemma-2 caps its logits after the head; scoring it here would be silently wrong."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.1,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="plain linear head"):
        load_model(str(tmp_path), tokenizer)


class Body:
    """A model of given states (2, 4, D), with a linear head and logits of its own."""

    config, device = SimpleNamespace(model_type="body"), "cpu"

    def __init__(self, states, shift=0.0):
        self.states, self.shift = states, shift
        self.head = nn.Linear(states.shape[-1], 5, bias=False)
        self.base_model = lambda input_ids, **how: SimpleNamespace(last_hidden_state=states)

    def get_output_embeddings(self):
        return self.head

    def __call__(self, ids, **how):
        return SimpleNamespace(logits=self.head(self.states) + self.shift)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_claim_a_past_that_changes_by_rounding_is_causal_and_by_more_is_not(scale):
    """The two rows differ in their last token; before it a thousandth of the states is rounding."""
    states = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1)
    states[:, 0, 0] = 0.0
    states[:, 1, 1] = 10.0  # the largest of all
    states *= scale
    for share, refused in ((5e-4, False), (2e-3, True)):
        other = states.clone()
        other[1, 2] += share * 10 * scale
        other[1, 3] -= 5 * scale  # the last token is another one
        if refused:
            with pytest.raises(InputError, match=r"The model x \(body\) is bidirectional"):
                _check_body_and_head(Body(other), "x")
        else:
            _check_body_and_head(Body(other), "x")
    with pytest.raises(InputError, match="plain linear head"):
        _check_body_and_head(Body(states, shift=1e-2), "x")


def test_claim_the_tiny_model_is_two_layers_of_wide_random_weights(tokenizer):
    """Each table of weights has a standard deviation of 0.1, of Pythia's shapes 0.02."""
    config = load_model("tiny", tokenizer).config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 64, 4)
    assert (config.vocab_size, config.max_position_embeddings) == (len(tokenizer), 256)
    for name, width in (("tiny", 0.1), ("random:pythia-14m", 0.02)):
        table = load_model(name, tokenizer).get_input_embeddings().weight
        assert abs(table.std().item() / width - 1) < 0.05
