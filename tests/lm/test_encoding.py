"""From text to ids: equal to TRL's data path in every family, begun once, ended once."""

import json
from types import SimpleNamespace

import pytest
from transformers import tokenization_utils_base

from qlearn.errors import InputError
from qlearn.lm.data import PREFERENCE_COLUMNS, begins_typed, boundary_merges, encode
from qlearn.lm.encoding import RULE, begin_ids, cut_at_seam, encode_prompts
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.lm.worlds import WORLDS, World
from tests import families
from tests.families import FAMILIES

ROWS = [
    {"prompt": "POST: he is late! TL;DR:", "chosen": " he is late.", "rejected": " he is not!"},
    {"prompt": "POST: no. TL;DR: ", "chosen": "Not torn", "rejected": "she was"},  # a seam
    {"prompt": "a b c d", "chosen": " e h.", "rejected": " h g e.\n"},
    {"prompt": "\n  Is it", "chosen": "n't late?", "rejected": " late ! "},
]
CHATS = [
    {"prompt": [{"role": "user", "content": "Is it late?"}],
     "chosen": [{"role": "assistant", "content": "No!"}],
     "rejected": [{"role": "assistant", "content": "Yes, it is."}]},
    {"prompt": [{"role": "system", "content": "Be torn."}, {"role": "user", "content": "Late?"},
                {"role": "assistant", "content": "Maybe."}, {"role": "user", "content": "No?"}],
     "chosen": [{"role": "assistant", "content": " Not at all."}],
     "rejected": [{"role": "assistant", "content": "all"}]},
]  # fmt: skip


def ours(tokenizer, rows):
    examples, faults = encode(list(enumerate(rows, 1)), PREFERENCE_COLUMNS, tokenizer, 512)
    assert not faults
    return examples


def theirs(tokenizer, rows):
    """(prompt, chosen, rejected) ids of each row by TRL's own code."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    trainer = SimpleNamespace(_tokenizer=tokenizer, _is_vision_dataset=False)
    args = trl.DPOConfig(max_length=None, bf16=False, report_to=[])
    table = trl.DPOTrainer._prepare_dataset(
        trainer, Dataset.from_list(rows), tokenizer, args, "train"
    )
    return [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in table]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "adds_end"])
def test_reference_trl_ids_of_text(family):
    tokenizer = FAMILIES[family]()
    examples = ours(tokenizer, ROWS)
    assert [(e.prompt, *e.completions) for e in examples] == theirs(tokenizer, ROWS)
    assert 2 in boundary_merges(examples) and 1 not in boundary_merges(examples)


def test_reference_trl_ids_of_messages():
    tokenizer = families.qwen()
    examples = ours(tokenizer, CHATS)
    assert [(e.prompt, *e.completions) for e in examples] == theirs(tokenizer, CHATS)
    assert not boundary_merges(examples)
    whole = tokenizer.decode(examples[0].prompt + examples[0].completions[0])
    assert whole.endswith("<|im_start|>assistant\nNo!<|im_end|>\n")


def test_reference_trl_ids_of_messages_with_tools_and_settings():
    """A template may read more than messages, and render a prompt alone in another way."""
    tokenizer = families.qwen()
    tokenizer.chat_template = (
        "{% if tools %}{{ tools[0].name }}\n{% endif %}{{ mood }}" + families.CHAT
        + "{% if add_generation_prompt %}be late{% endif %}"
    )  # fmt: skip
    more = {"tools": json.dumps([{"name": "clock"}]), "chat_template_kwargs": {"mood": "torn"}}
    rows = [row | more for row in CHATS]
    examples = ours(tokenizer, rows)
    assert [(e.prompt, *e.completions) for e in examples] == theirs(tokenizer, rows)
    assert tokenizer.decode(examples[0].prompt).startswith("clock\ntorn<|im_start|>user")
    assert boundary_merges(examples) == [1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_claim_a_text_begins_and_ends_once(family):
    tokenizer = FAMILIES[family]()
    begin = {"gpt2": [], "qwen": []}.get(family, [tokenizer.bos_token_id])
    assert begin_ids(tokenizer) == begin
    for e, row in zip(ours(tokenizer, ROWS), ROWS, strict=True):
        assert e.prompt[: len(begin)] == begin
        assert encode_prompts(tokenizer, [row["prompt"]])[0][: len(e.prompt)] == e.prompt
        for ids, name in zip(e.completions, ("chosen", "rejected"), strict=True):
            assert ids[-1] == tokenizer.eos_token_id
            assert not {tokenizer.eos_token_id, *begin} & {*ids[:-1], *e.prompt[len(begin) :]}
            text = tokenizer.decode(
                e.prompt + ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            # the decoder of Metaspace drops first spaces; llama's dummy prefix stands for one
            assert text.strip() == (row["prompt"] + row[name]).strip()


def test_claim_an_end_token_of_the_tokenizer_is_left_out():
    """Apart from the end that it adds, the tokenizer is llama's, and so are the ids."""
    tokenizer = families.adds_end()
    assert tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    assert ours(tokenizer, ROWS) == ours(families.llama(), ROWS)


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "gemma", "adds_end"])
def test_claim_a_typed_begin_token_counts_once_and_is_reported(family):
    tokenizer = FAMILIES[family]()
    typed = [ROWS[0] | {"prompt": tokenizer.bos_token + ROWS[0]["prompt"]}, ROWS[0]]
    first, second = ours(tokenizer, typed)
    assert (first.prompt, first.completions) == (second.prompt, second.completions)
    assert begins_typed([first, second]) == [1]
    assert encode_prompts(tokenizer, [r["prompt"] for r in typed])[0] == first.prompt
    twice = ROWS[0] | {"prompt": tokenizer.bos_token * 2 + ROWS[0]["prompt"]}
    _, faults = encode([(1, twice)], PREFERENCE_COLUMNS, tokenizer, 512)
    assert "prompt contains the special token" in faults[0].reason


def test_claim_an_end_of_text_at_the_front_is_no_begin_token():
    """GPT-2's one special token ends texts; nothing begins one."""
    tokenizer = families.gpt2()
    row = ROWS[0] | {"prompt": tokenizer.eos_token + "hi"}
    _, faults = encode([(1, row)], PREFERENCE_COLUMNS, tokenizer, 512)
    assert "prompt contains the special token" in faults[0].reason


def test_claim_a_begin_token_that_nobody_adds_may_be_typed():
    tokenizer = families.llama(pattern="")
    (example,) = ours(tokenizer, [ROWS[2] | {"prompt": "<s>" + ROWS[2]["prompt"]}])
    (plain,) = ours(tokenizer, [ROWS[2]])
    assert example.prompt == [tokenizer.bos_token_id, *plain.prompt] and begins_typed([example])


@pytest.mark.parametrize("name", WORLDS)
def test_claim_a_worlds_rows_have_the_ids_they_always_had(name):
    """A world's tokenizer adds nothing, so encoding jointly or apart is the same."""
    tokenizer = load_tokenizer(World(name).grammar.name)
    rows = World(name).sft_rows(64, "encoding")
    columns = ("prompt", "completion")
    examples, faults = encode(list(enumerate(rows, 1)), columns, tokenizer, 512)
    assert not faults and not boundary_merges(examples) and not begins_typed(examples)
    for example, row in zip(examples, rows, strict=True):
        prompt, completion = (
            tokenizer(row[c], add_special_tokens=False).input_ids for c in columns
        )
        assert example.prompt == prompt == encode_prompts(tokenizer, [row["prompt"]])[0]
        assert example.completions == ([*completion, tokenizer.eos_token_id],)


@pytest.mark.parametrize("family", FAMILIES)
def test_claim_a_run_saved_under_the_old_rule_is_refused_where_the_rules_differ(family, tmp_path):
    FAMILIES[family]().save_pretrained(tmp_path)
    load_tokenizer(str(tmp_path))  # no run of ours: nothing is recorded, nothing was different
    (tmp_path / "qlearn.yaml").write_text("beta: 0.1\n")
    (tmp_path / "summary.json").write_text("{}")
    if family in ("gpt2", "qwen"):
        load_tokenizer(str(tmp_path))
    else:
        with pytest.raises(InputError, match="was saved before rows were encoded"):
            load_tokenizer(str(tmp_path))
    (tmp_path / "summary.json").write_text(json.dumps({"encoding": RULE}))
    load_tokenizer(str(tmp_path))


def test_claim_the_prompt_is_cut_to_what_every_whole_shares():
    """The shortest common beginning counts, whichever completion has it; the rest goes along."""
    for wholes in ([[1, 2, 3, 4], [1, 2, 7, 8]], [[1, 2, 7, 8], [1, 2, 3, 4]]):
        rest = tuple(whole[2:] for whole in wholes)
        assert cut_at_seam([1, 2, 3], wholes) == ([1, 2], rest, 1)
    assert cut_at_seam([1, 2, 3], [[1, 2, 3, 4]]) == ([1, 2, 3], ([4],), 0)
    assert cut_at_seam([1, 2, 3], []) == ([1, 2, 3], (), 0)


def test_claim_prompts_of_text_and_of_messages_may_be_mixed():
    """Messages are rendered up to where the answer begins; a text stays as it is."""
    tokenizer = families.qwen()
    rendered = "<|im_start|>user\nIs it late?<|im_end|>\n<|im_start|>assistant\n"
    expected = [tokenizer(text).input_ids for text in ("Is it?", rendered, "No.")]
    assert encode_prompts(tokenizer, ["Is it?", CHATS[0]["prompt"], "No."]) == expected


def test_claim_transformers_warns_of_no_length(monkeypatch):
    """What is too long has a fault of its own, with its row: no warning without one beside it."""
    warned = []
    logger = tokenization_utils_base.logger
    monkeypatch.setattr(logger, "warning", lambda message, *_: warned.append(message))
    tokenizer = families.gpt2()
    tokenizer.model_max_length = 2
    encode_prompts(tokenizer, ["Is it late? No."])
    assert warned == []
    tokenizer("Is it late? No.")
    assert len(warned) == 1 and "longer than the specified maximum" in warned[0]
