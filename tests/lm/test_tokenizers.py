"""Which tokenizers belong together: compared by what they do, with the first difference named."""

import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, tokenization_utils_base

from qlearn.errors import InputError
from qlearn.lm.grammar import EOS, PAD
from qlearn.lm.tokenizers import (
    PROBE,
    check_knows,
    check_same_tokenizer,
    first_difference,
    own_tokenizer,
)
from qlearn.lm.worlds import World
from tests import families
from tests.families import FAMILIES


def changed(tokenizer, change, **special):
    """A copy whose tokenizer.json went through `change`, with other special tokens."""
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    change(inner)
    kept = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(inner)), **(kept | special)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_claim_a_tokenizer_equals_its_saved_self(family, tmp_path, capsys):
    """Also with a padding token of TRL's choice: padding is never read."""
    tokenizer = FAMILIES[family]()
    tokenizer.save_pretrained(tmp_path)
    again = own_tokenizer(str(tmp_path), tokenizer, "reference", given=False)
    again.pad_token = again.eos_token
    check_same_tokenizer(tokenizer, again, "reference")
    assert capsys.readouterr().out == ""


def swap_words(inner):
    vocab = inner["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def drop_a_merge(inner):
    """The vocabulary stays as it is: only its last token's own text shows the difference."""
    inner["model"]["merges"].pop()


@pytest.mark.parametrize(
    ("change", "special", "sentence"),
    [
        (swap_words, {}, r"token \d+ is 'a' in the one and 'b' in the other"),
        (swap_words, {"eos_token": "<s>"}, r"token \d+ is 'a' in the one and 'b' in the other"),
        (drop_a_merge, {}, "the text '.*' becomes .* in the one and .* in the other"),
        (lambda inner: inner.update(pre_tokenizer=None), {}, 'the text "The nurse'),
        (lambda inner: inner.update(post_processor=None), {}, "begins a text with <s> and the"),
        (lambda inner: None, {"eos_token": "<unk>"}, "ends a text with </s> and the other with"),
        (lambda inner: inner["normalizer"] or inner.update(normalizer={"type": "Lowercase"}), {},
         'the text "The nurse'),
    ],
)  # fmt: skip
def test_claim_the_first_difference_is_named(change, special, sentence):
    tokenizer = families.llama()
    other = changed(tokenizer, change, **special)
    with pytest.raises(InputError, match=f"the reference's are not the same: .*{sentence}"):
        check_same_tokenizer(tokenizer, other, "reference")


def test_claim_as_many_tokens_are_not_the_same_tokenizer():
    """Two vocabularies of one size, trained on the same text."""
    with pytest.raises(InputError, match="token 0 is '!' in the one"):
        check_same_tokenizer(families.gpt2(), families.llama(), "guide")


def test_claim_a_padding_token_that_only_one_has_is_lawful_and_explained(capsys):
    """49,153 tokens beside 49,152: somebody added <pad>, which no row can hold."""
    plain, padded = families.gpt2(), families.gpt2()
    padded.add_special_tokens({"pad_token": "<pad>"})
    assert len(padded) == len(plain) + 1
    for pair in ((plain, padded), (padded, plain)):
        check_same_tokenizer(*pair, "reference")
        assert "has the special token <pad>; no row can hold it" in capsys.readouterr().out


def test_claim_a_word_or_a_turn_that_only_one_has_is_refused():
    plain, more, chat = families.gpt2(), families.gpt2(), families.gpt2()
    more.add_tokens(["nursery"])
    chat.add_special_tokens({"pad_token": "<|im_start|>"})
    chat.chat_template = families.CHAT
    for other, token in ((more, "nursery"), (chat, r"<\|im_start\|>")):
        with pytest.raises(InputError, match=f"is missing in the one and '{token}' in the other"):
            check_same_tokenizer(plain, other, "reference")


def test_claim_a_directory_without_a_tokenizer_takes_the_named_one(tmp_path):
    tokenizer = families.gpt2()
    families.tiny_llama(tokenizer).save_pretrained(tmp_path)
    assert own_tokenizer(str(tmp_path), tokenizer, "reference", given=True) is tokenizer
    assert own_tokenizer("tiny", tokenizer, "reference", given=False) is tokenizer
    with pytest.raises(InputError, match="tokenizer"):
        own_tokenizer(str(tmp_path), tokenizer, "reference", given=False)


def words_of(ids: dict[str, int], begin: str | None = None, normalizer=None, **special):
    """A tokenizer of whole words with these ids, which may put a token in front of each text."""
    inner = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if normalizer is not None:
        inner.normalizer = normalizer
    if begin:
        marks = [(begin, ids[begin])]
        inner.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.mark.parametrize("which", [2, 100, -1])
def test_claim_one_word_that_a_tokenizer_lacks_is_enough(which):
    """The first of a world's words, the last, and one between."""
    world = World("slots")
    words = world.vocabulary()
    special = dict(unk_token=PAD, eos_token=EOS)
    check_knows(words_of({w: i for i, w in enumerate(words)}, **special), world)
    lost = words.pop(which)
    known = words_of({w: i for i, w in enumerate(words)}, **special)
    sentence = f"does not know 1 words of the world slots, '{lost}' for one; .* --tokenizer slots"
    with pytest.raises(InputError, match=sentence):
        check_knows(known, world)


def test_claim_a_token_in_front_of_each_text_is_no_unknown_word():
    """GPT-2's end of text is its unknown word too, and some tokenizers begin each text with it."""
    world = World("slots")
    ids = {w: i for i, w in enumerate(world.vocabulary())}
    check_knows(words_of(ids, begin=EOS, unk_token=EOS, eos_token=EOS), world)


SPARSE = {EOS: 2, PAD: 3, "qq": 128, "zz": 1, "kk": 5}  # in a set these ids are not in order


def test_claim_the_first_difference_is_that_of_the_least_id():
    special = dict(unk_token=PAD, eos_token=EOS)
    one, two = (words_of(SPARSE | x, **special) for x in ({}, {"qq": 1, "zz": 128}))
    assert first_difference(one, two) == "token 1 is 'zz' in the one and 'qq' in the other"
    both = [normalizers.Replace("qq", "kk"), normalizers.Replace("zz", "kk")]
    two = words_of(SPARSE, normalizer=normalizers.Sequence(both), **special)
    assert first_difference(one, two) == "the text 'zz' becomes zz in the one and kk in the other"


def test_claim_the_end_that_only_one_adds_is_no_difference():
    """Rows are encoded without it."""
    assert first_difference(families.llama(), families.adds_end()) is None


def test_claim_eight_tokens_of_a_text_are_shown(monkeypatch):
    """Of each tokenizer, on the first text of the probe; and transformers warns of no length."""
    warned = []
    logger = tokenization_utils_base.logger
    monkeypatch.setattr(logger, "warning", lambda message, *_: warned.append(message))
    one = families.gpt2()
    space = {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True,
                               "trim_offsets": True, "use_regex": True}}  # fmt: skip
    two = changed(one, lambda inner: inner.update(space))
    one.model_max_length = two.model_max_length = 4
    difference = first_difference(one, two)
    assert warned == []
    text, _, shown = difference.partition(" becomes ")
    left, right = shown.removesuffix(" in the other").split(" in the one and ")
    assert text == 'the text "The nurse said: No! She\'s 31,415 days la"'
    both = [x.convert_ids_to_tokens(x(PROBE[0]).input_ids) for x in (one, two)]
    assert min(map(len, both)) > 8 and len(warned) == 2  # of the line above, one of each
    assert [left.split(), right.split()] == [tokens[:8] for tokens in both]


def test_claim_all_special_tokens_that_only_one_has_are_named_in_order(capsys):
    plain, more = families.gpt2(), families.gpt2()
    extra = [f"<{letter}>" for letter in "gcafbed"]
    more.add_special_tokens({"additional_special_tokens": extra})
    check_same_tokenizer(plain, more, "reference")
    assert "special token <a>, <b>, <c>, <d>, <e>, <f>, <g>; no row" in capsys.readouterr().out
