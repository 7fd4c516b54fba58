"""Rows in, examples and reasons out: every fault of a file and of a row."""

import re

import datasets
import pytest

from qlearn.errors import InputError
from qlearn.lm import check
from qlearn.lm.data import (
    PREFERENCE_COLUMNS,
    SFT_COLUMNS,
    boundary_merges,
    check_quarantine,
    encode,
)
from qlearn.lm.rows import Unreadable, preview_of, read_rows, require_columns
from tests import families

GOOD = {"prompt": "POST: I am a junior nurse. TL;DR:", "chosen": " Torn.", "rejected": " Happy."}


def test_claim_jsonl_and_parquet_hold_the_same_rows(write_jsonl, preference_rows, tmp_path):
    path = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(preference_rows).to_parquet(path)
    from_jsonl = read_rows(write_jsonl("rows.jsonl", preference_rows), PREFERENCE_COLUMNS)
    assert from_jsonl == read_rows(path, PREFERENCE_COLUMNS)
    assert from_jsonl[0] == (1, preference_rows[0])


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([GOOD, '{"prompt": '], r"bad\.jsonl, line 2: not valid JSON"),
        ([], r"bad\.jsonl is empty"),
        (["", "  "], r"bad\.jsonl is empty"),
        ([{"prompt": "a", "winner": "b", "loser": "c"}],
         r"bad\.jsonl has no column chosen, rejected; it has loser, prompt, winner"),
        (["[1, 2]"], r"has no column prompt, chosen, rejected; it has none"),
    ],
)  # fmt: skip
def test_claim_faults_of_a_file_are_named(write_jsonl, lines, sentence):
    """Trap 5 too: a prompt is required, never guessed from what two completions share."""
    with pytest.raises(InputError, match=sentence):
        read_rows(write_jsonl("bad.jsonl", lines), PREFERENCE_COLUMNS)


def test_claim_sources_that_are_not_there_are_named(tmp_path):
    cases = {
        str(tmp_path / "no.jsonl"): "There is no file",
        str(tmp_path): "must be a .jsonl or .parquet file",
        "nobody/nothing": "pass the path of a local",
    }
    for source, sentence in cases.items():
        with pytest.raises(InputError, match=sentence):
            read_rows(source, SFT_COLUMNS)
    (tmp_path / "no.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(InputError, match="not a readable parquet file"):
        read_rows(str(tmp_path / "no.parquet"), SFT_COLUMNS)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        read_rows(str(tmp_path / "latin.jsonl"), SFT_COLUMNS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": None}, "chosen is missing or None"),
        ({"prompt": ""}, "prompt is empty"),
        ({"rejected": " \n"}, "rejected is empty"),
        (
            {"chosen": [{"role": "user", "content": "x"}]},
            "prompt is text, chosen is messages, rejected is text; not both",
        ),
        ({"chosen": GOOD["rejected"]}, "chosen equals rejected"),
        ({"chosen": GOOD["rejected"] + " "}, "become the same tokens"),
        ({"prompt": "a <|endoftext|> b"}, r"prompt contains the special token <\|endoftext\|>"),
        ({"prompt": "nurse " * 40}, "the prompt has 40 tokens, longer than the context of 32$"),
        (
            {"prompt": "nurse " * 32},
            "^prompt and chosen have 35 tokens, longer than the 32 allowed$",
        ),
        # twelve tokens of the prompt, thirty words and the end
        (
            {"chosen": " nurse" * 30},
            "^prompt and chosen have 43 tokens, longer than the 32 allowed$",
        ),
    ],
)
def test_claim_faults_of_a_row_have_reasons(tokenizer, change, reason):
    """Traps 3 and 4: nothing is cut, nothing dropped without its row number and reason."""
    rows = [(1, GOOD), (2, GOOD | change), (3, GOOD)]
    examples, faults = encode(rows, PREFERENCE_COLUMNS, tokenizer, max_length=32)
    assert [example.row for example in examples] == [1, 3]
    assert [fault.row for fault in faults] == [2]
    assert re.search(reason, faults[0].reason), faults[0].reason


def test_claim_completions_end_with_end_of_text(tokenizer):
    """Trap 2: once, whatever the text ends with, so that the terminal value is 0."""
    (example,), _ = encode([(1, GOOD)], PREFERENCE_COLUMNS, tokenizer, 64)
    for ids in example.completions:
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(example.completions[0][:-1]) == "Torn."


def test_claim_boundary_merges_are_counted(write_jsonl):
    """Trap 1: a completion without its leading space can fuse with the prompt's last token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "Ġb": 5}
    inner = Tokenizer(models.BPE(vocab, [("a", "b"), ("Ġ", "b")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    fused = {"prompt": "ba", "completion": "b"}
    apart = {"prompt": "ba", "completion": " b"}
    alone = {"prompt": "a", "completion": "b"}
    examples, faults = encode([(7, fused), (8, apart), (9, alone)], SFT_COLUMNS, bpe, 8)
    assert [(e.prompt, e.completions[0]) for e in examples] == [([2], [3, 0]), ([2, 1], [5, 0])]
    assert boundary_merges(examples) == [7]
    assert [(f.row, f.reason) for f in faults] == [(9, "the prompt has no token of its own")]


def test_claim_too_many_faults_end_the_run(tokenizer):
    rows = [(n, GOOD if n > 2 else GOOD | {"chosen": None}) for n in range(1, 101)]
    _, faults = encode(rows, PREFERENCE_COLUMNS, tokenizer, 64)
    check_quarantine(faults, len(rows), allowed=0.02, source="f.jsonl")
    with pytest.raises(InputError, match=r"f.jsonl: 2 of 100 rows .* row 1: chosen is missing"):
        check_quarantine(faults, len(rows), allowed=0.01, source="f.jsonl")


def test_claim_all_rows_bad_still_gives_reasons(tokenizer):
    examples, faults = encode([(1, {}), (2, 3)], PREFERENCE_COLUMNS, tokenizer, 64)
    assert not examples and "the row is a number" in faults[1].reason


def test_claim_a_row_of_exactly_the_longest_length_is_used(tokenizer):
    """One word and the end behind a prompt of thirty; one word more is too long."""
    fits = {"prompt": "nurse " * 30, "completion": " nurse"}
    over = fits | {"completion": " nurse nurse"}
    examples, faults = encode([(1, fits), (2, over)], SFT_COLUMNS, tokenizer, 32)
    assert [(len(e.prompt), len(e.completions[0])) for e in examples] == [(30, 2)]
    assert [(f.row, f.reason) for f in faults] == [
        (2, "prompt and completion have 33 tokens, longer than the 32 allowed")
    ]


def test_claim_faults_come_in_the_order_of_the_rows(tokenizer):
    """Those that show in the tokens too, which are found after all others; each with its start."""
    long = GOOD | {"prompt": "nurse " * 40}
    rows = [(1, long), (2, GOOD | {"chosen": None}), (3, GOOD), (4, long), (5, 3)]
    _, faults = encode(rows, PREFERENCE_COLUMNS, tokenizer, 32)
    assert [(fault.row, fault.preview) for fault in faults] == [
        (number, str(row)[:120]) for number, row in rows if number != 3
    ]


def test_bug_a_message_for_which_the_template_writes_nothing_is_named():
    """It was let through, and ended the run with a traceback where rows are put together."""
    tokenizer = families.qwen()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content.strip('_') }}{% endfor %}"
    said = [{"role": "assistant", "content": " No."}]
    row = {"prompt": [{"role": "user", "content": "Late?"}], "completion": said}
    mute = row | {"completion": [said[0] | {"content": "__"}]}
    examples, faults = encode([(1, row), (2, mute)], SFT_COLUMNS, tokenizer, 32)
    assert [e.row for e in examples] == [1]
    assert [(f.row, f.reason) for f in faults] == [(2, "the completion has no token of its own")]


def test_claim_a_preview_is_how_a_row_begins():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert preview_of({"prompt": "a" * 200}) == "{'prompt': '" + "a" * 108
    assert preview_of(Unreadable("torn", "{'pro")) == "{'pro" and preview_of(deep) == "..."


def test_claim_columns_are_asked_of_the_rows_that_can_be_read():
    """One row that cannot be read excuses no other; where none can, each has its own reason."""
    torn = Unreadable("torn", "...")
    require_columns([(1, torn), (2, torn)], SFT_COLUMNS, "f")
    with pytest.raises(InputError, match="f has no column prompt, completion; it has x"):
        require_columns([(1, torn), (2, {"x": 1})], SFT_COLUMNS, "f")


def test_claim_data_check_reports_every_number(write_jsonl, capsys):
    """The whole report of ten equal rows, of which nine are duplicates, three longer, two odd."""
    long = [GOOD | {"prompt": "nurse " * n, "chosen": " Torn" * n} for n in (20, 40, 60)]
    odd = [GOOD | {"chosen": ""}, GOOD | {"prompt": ""}]
    path = write_jsonl("f.jsonl", [GOOD] * 10 + long + [*odd, GOOD | {"prompt": ""}])
    config = dict(data=path, tokenizer="slots", max_quarantine=0.5)
    check.run(check.CheckConfig(**config))
    report = capsys.readouterr().out.splitlines()
    assert report == [
        f"{path}: 16 rows of prompt, chosen, rejected",
        "usable rows: 13",
        "  prompt     tokens: least 12, median 12, most 60",
        "  chosen     tokens: least 3, median 3, most 61",
        "  rejected   tokens: least 3, median 3, most 3",
        "boundary merges: 0",
        "begin tokens typed (each counts once): 0",
        "duplicates: 9 (row 2, 3, 4, 5, 6, 7, 8, 9, ...)",
        "quarantined rows: 3",
        "  2 x prompt is empty (row 15, 16)",
        "  1 x chosen is empty (row 14)",
    ]
    check.run(check.CheckConfig(**config, max_length=121))
    assert capsys.readouterr().out.splitlines() == report
    check.run(check.CheckConfig(**config, max_length=120))
    over = "  1 x prompt and chosen have 121 tokens, longer than the 120 allowed (row 13)"
    assert over in capsys.readouterr().out.splitlines()
    with pytest.raises(InputError, match=r"f\.jsonl: 3 of 16 rows cannot be used"):
        check.run(check.CheckConfig(data=path))  # one of a hundred may be odd
    assert capsys.readouterr().out.splitlines()[:3] == [
        *report[:2], "  lengths and tokens: pass --policy DIR or --tokenizer"
    ]  # fmt: skip


def test_claim_data_check_allows_what_is_usual_where_nothing_is_said(write_jsonl, capsys):
    """One odd row of a hundred, and 2,048 tokens."""
    rows = [GOOD | {"prompt": f"nurse {'nurse ' * n}"} for n in range(98)]
    path = write_jsonl("f.jsonl", [*rows, {"prompt": "nurse " * 2045} | {
        "chosen": " Torn Torn", "rejected": " Torn"}, GOOD | {"chosen": ""}])  # fmt: skip
    check.run(check.CheckConfig(data=path, tokenizer="slots"))
    out = capsys.readouterr().out
    assert "usable rows: 99" in out and "most 2045" in out
    path = write_jsonl("f.jsonl", [*rows, GOOD | {"prompt": ""}, GOOD | {"chosen": ""}])
    with pytest.raises(InputError, match=r"2 of 100 rows .* more than --max-quarantine 0\.01"):
        check.run(check.CheckConfig(data=path))
    path = write_jsonl("f.jsonl", [GOOD, {"prompt": "nurse " * 2046} | {
        "chosen": " Torn Torn", "rejected": " Torn"}])  # fmt: skip
    with pytest.raises(
        InputError, match="prompt and chosen have 2049 tokens, longer than the 2048"
    ):
        check.run(check.CheckConfig(data=path, tokenizer="slots"))


def test_claim_a_duplicate_may_write_its_keys_in_another_order():
    """{"role", "content"} and {"content", "role"} are one message; another text is not."""
    one, two = {"role": "user", "content": "a"}, {"content": "a", "role": "user"}
    rows = [(n, {"prompt": [x], "completion": "b"}) for n, x in ((3, one), (4, two), (7, one))]
    rows.append((8, {"prompt": [one], "completion": "c"}))
    assert check.duplicates(rows, SFT_COLUMNS) == [4, 7]


def test_bug_rows_that_can_be_read_only_once(tokenizer, preference_rows):
    """`encode` takes an iterator, as `enumerate` gives it."""
    once = encode(enumerate(preference_rows, 1), PREFERENCE_COLUMNS, tokenizer, 256)
    again = encode(list(enumerate(preference_rows, 1)), PREFERENCE_COLUMNS, tokenizer, 256)
    assert once == again and len(once[0]) > 0
