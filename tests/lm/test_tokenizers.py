"""Which tokenizers belong together: compared by what they do, with the first difference named."""

import json

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from qlearn.errors import InputError
from qlearn.lm.tokenizers import check_same_tokenizer, own_tokenizer
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
