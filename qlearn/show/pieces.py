"""The text of each token, where one character may need several tokens.

A byte-level tokenizer spells an emoji or a CJK character with two to four tokens, none of which is
text; a SentencePiece one writes "▁" for a space and may drop the first. So tokens that share a
character are joined, and the pieces together are the response as it was typed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from qlearn.findings.credit import Credit


class Piece(NamedTuple):
    """Text, how many tokens spell it, and whether the tokenizer reads it as unknown."""

    text: str
    n_tokens: int
    unknown: bool = False

    def __str__(self):
        """The text quoted, and what is odd about it: `'😀' (3 tokens)`."""
        odd = f" ({self.n_tokens} tokens)" * (self.n_tokens > 1) + " (unknown)" * self.unknown
        return f"{self.text!r}{odd}"


def pieces(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | None,
    text: str | None,
    prompt_ids: Sequence[int],
    ids: Sequence[int],
) -> list[Piece]:
    """The pieces of a response: `ids`, end of text included, that `text` became.

    They spell `text`, and then the end. Where text is None, or these ids are not what the tokenizer
    makes of it, they spell what the ids decode to.
    """
    ids, ends = list(ids), []
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
        ends = [Piece(tokenizer.eos_token, 1)]
    # A completion may have been encoded alone, or behind its prompt and cut.
    for before in ("", prompt) if prompt is not None and text is not None else ():
        spans = _spans(tokenizer, before, text, ids)
        if spans is not None:
            return [*_by_spans(text, spans, ids, tokenizer.unk_token_id), *ends]
    return [*_by_decoding(tokenizer, list(prompt_ids), ids, text), *ends]


def credit_of_pieces(credit: Credit, parts: Sequence[Piece]) -> Credit:
    """The credit of pieces (P,) from that of tokens (T,): log-probabilities and credit add up.

    log π of a character is the sum over its tokens; the value after it is that after its last one.

    >>> one = torch.ones(3)
    >>> by_token = Credit(-one, -2 * one, one, one.cumsum(0), 2 * one)
    >>> credit_of_pieces(by_token, [Piece("😀", 2), Piece("!", 1)]).advantage
    tensor([2., 1.])
    """
    sizes = [part.n_tokens for part in parts]
    sums = (torch.stack([x.sum() for x in column.split(sizes)]) for column in credit)
    logp, ref_logp, advantage, _, surprisal = sums
    last = torch.tensor(sizes).cumsum(0) - 1
    return Credit(logp, ref_logp, advantage, credit.value[last], surprisal)


def _spans(tokenizer, before: str, text: str, ids: list[int]) -> list[tuple[int, int]] | None:
    """(start, stop) in `text` of each id, from the tokenizer itself; None where it cannot tell."""
    if not (tokenizer.is_fast and ids):
        return None
    encoding = tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True)
    if encoding.input_ids[-len(ids) :] != ids:
        return None
    skip = len(before)
    return [(max(a - skip, 0), max(b - skip, 0)) for a, b in encoding.offset_mapping[-len(ids) :]]


def _by_spans(text: str, spans: list[tuple[int, int]], ids: list[int], unk: int | None):
    """Pieces from spans: tokens that overlap are one, what no token covers joins the next."""
    sizes, stops, odd = [], [], []
    for (start, stop), token in zip(spans, ids, strict=True):
        end = stops[-1] if stops else 0
        if sizes and (start < end or stop <= end):
            sizes[-1] += 1
            stops[-1] = max(end, stop)
            odd[-1] |= token == unk
        elif sizes and end == 0:  # so far nothing but a space that the tokenizer itself put in
            sizes[-1] += 1
            stops[-1], odd[-1] = stop, token == unk
        else:
            sizes.append(1)
            stops.append(stop)
            odd.append(token == unk)
    stops[-1] = len(text)
    starts = [0, *stops[:-1]]
    parts = zip(starts, stops, sizes, odd, strict=True)
    return [Piece(text[a:b], size, unknown) for a, b, size, unknown in parts]


def _by_decoding(tokenizer, prompt: list[int], ids: list[int], text: str | None) -> list[Piece]:
    """Pieces from what the tokens so far decode to: cut where that is a beginning of the whole."""
    before, whole = _decode(tokenizer, prompt), _decode(tokenizer, [*prompt, *ids])
    # A decoder may drop the first space of a text, so it is asked with the prompt in front.
    if not whole.startswith(before) or (text is not None and whole[len(before) :] != text):
        prompt, before, whole = [], "", _decode(tokenizer, ids)
    row, whole, found = [*prompt, *ids], whole[len(before) :], []
    done, at = len(prompt), 0  # tokens and characters that are in pieces
    cuts = [0]  # where a piece began: a decoder looks at its neighbours, so a few are decoded along
    for stop in range(done + 1, len(row) + 1):
        first = cuts[max(0, len(cuts) - 4)]
        known, longer = _decode(tokenizer, row[first:done]), _decode(tokenizer, row[first:stop])
        new = longer[len(known) :] if longer.startswith(known) else ""
        if new and whole.startswith(new, at):
            found.append(Piece(new, stop - done, tokenizer.unk_token_id in row[done:stop]))
            cuts.append(done)
            done, at = stop, at + len(new)
    if done < len(row):  # tokens that add no text, or none that can be told apart
        rest, n_tokens = whole[at:], len(row) - done
        if found and not rest:
            rest, n_tokens = found[-1].text, n_tokens + found[-1].n_tokens
            found.pop()
        found.append(Piece(rest, n_tokens))
    return found


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
