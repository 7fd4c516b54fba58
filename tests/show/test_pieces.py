"""Tokens as text: the pieces spell the response as it was typed, in every family."""

import pytest
import torch

from qlearn.findings.credit import Credit
from qlearn.show.pieces import Piece, credit_of_pieces, pieces

from .families import FAMILIES

RESPONSES = (
    " sat. 😀 日本語 👩‍👩‍👧 ok",
    "sat on the mat",
    "  two  spaces\n",
    "😀",
    " a replacement character � in between",
    " e\u0301 combining, \u00e9 not",
    " ",
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("response", RESPONSES)
def test_claim_pieces_spell_the_response_as_it_is(family, response):
    """Whatever the tokenizer makes of spaces, bytes and unknown characters; no token is lost."""
    tokenizer = FAMILIES[family]()
    prompt = "The cat"
    prompt_ids, ids = (tokenizer(t, add_special_tokens=False).input_ids for t in (prompt, response))
    found = pieces(tokenizer, prompt, response, prompt_ids, [*ids, tokenizer.eos_token_id])
    assert "".join(piece.text for piece in found[:-1]) == response
    assert found[-1] == Piece(tokenizer.eos_token, 1)
    assert sum(piece.n_tokens for piece in found) == len(ids) + 1
    assert all(piece.text for piece in found)


@pytest.mark.parametrize("family", ["byte_level", "byte_fallback"])
def test_bug_tokens_that_share_a_character_are_one_piece(family):
    """An emoji stood as "�" three or four times."""
    tokenizer = FAMILIES[family]()
    ids = tokenizer(" 😀日!", add_special_tokens=False).input_ids
    found = pieces(tokenizer, "The cat", " 😀日!", [], ids)
    assert [(p.text, p.n_tokens) for p in found[-3:]] == [("😀", 4), ("日", 3), ("!", 1)]
    assert str(found[-3]) == "'😀' (4 tokens)"


@pytest.mark.parametrize("family", ["byte_level", "byte_fallback"])
def test_claim_ids_without_their_text_are_decoded_into_pieces(family):
    """Where the typed text is not at hand (messages), or the ids are a model's own."""
    tokenizer = FAMILIES[family]()
    prompt_ids = tokenizer("Q: 日", add_special_tokens=False).input_ids
    ids = tokenizer("the 😀 日本 mat", add_special_tokens=False).input_ids
    found = pieces(tokenizer, None, None, prompt_ids, ids)
    assert "".join(p.text for p in found).strip() == "the 😀 日本 mat"
    sizes = {p.text: p.n_tokens for p in found}
    assert sizes["😀"] == 4 and sizes["日"] == sizes["本"] == 3


def test_claim_unknown_characters_are_shown_and_said_to_be_unknown():
    tokenizer = FAMILIES["metaspace"]()
    ids = tokenizer(" cat 😀", add_special_tokens=False).input_ids
    found = pieces(tokenizer, "The", " cat 😀", [], ids)
    assert str(found[-1]) == "'😀' (unknown)" and not found[0].unknown


def test_claim_completions_cut_from_a_joint_encoding_are_understood():
    """Prompt and completion encoded together: the completion's tokens keep their own text."""
    tokenizer = FAMILIES["metaspace"]()
    joint = tokenizer("The cat sat on the mat", add_special_tokens=False).input_ids
    n_prompt = len(tokenizer("The cat", add_special_tokens=False).input_ids)
    found = pieces(tokenizer, "The cat", " sat on the mat", joint[:n_prompt], joint[n_prompt:])
    assert "".join(p.text for p in found) == " sat on the mat"


def test_claim_credit_of_a_piece_is_the_sum_over_its_tokens():
    """By hand: tokens 1, 2, 4 with the first two in one piece."""
    a = torch.tensor([1.0, 2.0, 4.0])
    by_token = Credit(-a, -2 * a, a, a.cumsum(0), 2 * a)
    found = credit_of_pieces(by_token, [Piece("😀", 2), Piece("!", 1)])
    assert found.logp.tolist() == [-3, -4] and found.ref_logp.tolist() == [-6, -8]
    assert found.advantage.tolist() == [3, 4] and found.surprisal.tolist() == [6, 8]
    assert found.value.tolist() == [3, 7]
