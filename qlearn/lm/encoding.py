"""From the text of a row to its token ids: the one place that makes them.

A row's ids are those of TRL's data path, token by token (TRL 1.16.0, `DPOTrainer._prepare_dataset`
in trl/trainer/dpo_trainer.py with `_tokenize` and `common_prefix_length` in trl/data_utils.py):

  text       prompt = tokenizer(prompt), whole = tokenizer(prompt + completion + end of text)
  messages   prompt = template(prompt, add_generation_prompt=True), whole = template(prompt +
             completion)
  the seam   the prompt is cut to what is common to it and to every whole; the rest of a whole is
             its completion

A text begins as its tokenizer begins one (`<s>` for Llama). Two differences from TRL, neither of
which touches a row without such tokens: an end token that the tokenizer adds of itself is left out,
so the end of text stands once and only behind the completion; and a begin token that was typed at
the front of a prompt counts once, where TRL has it twice.

The seam: prompt and completion are encoded jointly and cut, not apart. A SentencePiece tokenizer
puts a space in front of every text, so a completion that is encoded alone begins with a space that
stands in no text; and what a model has read before is joint text. The price is that a token can
straddle the seam. Then the completion takes the end of the prompt along, and the row is counted.
"""

import json
import os
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from qlearn.errors import InputError

RULE = "begun-joint"  # the name of the rule above, which a run's summary.json records
Text = str | list[dict]  # a text, or messages


class Encoded(NamedTuple):
    """A row's ids, and how many of its prompt's last tokens the completion took along."""

    prompt: list[int]
    completions: tuple[list[int], ...]
    n_straddling: int = 0


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a tokenizer puts in front of every text: [] for GPT-2, [<s>] for Llama."""
    alone, framed = _plain(tokenizer, ["a"])[0], tokenizer("a").input_ids
    for start in range(len(framed)):
        if framed[start : start + len(alone)] == alone:
            return framed[:start]
    return []


def typed_begin(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> str:
    """The begin token that somebody typed at the front of a prompt, or "".

    Where one token both begins and ends texts (GPT-2) it counts as a begin only if the tokenizer
    writes it there itself.
    """
    bos = tokenizer.bos_token
    if bos is None or not isinstance(prompt, str) or not prompt.startswith(bos):
        return ""
    begins = bos != tokenizer.eos_token or tokenizer.bos_token_id in begin_ids(tokenizer)
    return bos if begins else ""


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]
) -> list[list[int]]:  # fmt: skip
    """The ids of each prompt, begun as the tokenizer begins a text, or rendered by its template."""
    if any(not isinstance(prompt, str) for prompt in prompts):
        return [
            encode_prompts(tokenizer, [prompt])[0]
            if isinstance(prompt, str)
            else _rendered(tokenizer, prompt, add_generation_prompt=True)
            for prompt in prompts
        ]
    begin = begin_ids(tokenizer)
    typed = [typed_begin(tokenizer, prompt) for prompt in prompts]
    texts = [prompt.removeprefix(mark) for prompt, mark in zip(prompts, typed, strict=True)]
    # A typed begin token that the tokenizer does not write itself stands there all the same.
    begins = [begin or [tokenizer.bos_token_id] * bool(mark) for mark in typed]
    return [b + ids for b, ids in zip(begins, _plain(tokenizer, texts), strict=True)]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, ...]]
) -> list[Encoded]:
    """The ids of rows of text: each a prompt and its completions, one or more or none.

    A completion ends with the end of text, once.
    """
    prompts = encode_prompts(tokenizer, [prompt for prompt, *_ in rows])
    n_completions = len(rows[0]) - 1 if rows else 0
    wholes = [
        encode_prompts(tokenizer, [row[0] + row[k] + tokenizer.eos_token for row in rows])
        for k in range(1, n_completions + 1)
    ]  # one list of rows for each completion
    return [cut_at_seam(prompt, [whole[i] for whole in wholes]) for i, prompt in enumerate(prompts)]


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    row: tuple[list[dict], ...],
    tools: str | list | None = None,
    **template_settings,
) -> Encoded:
    """The ids of a row of messages, as the tokenizer's chat template writes them.

    Where a completion ends is the template's affair: most end a turn with the end of text and a
    line break. `tools` (JSON, or what it holds) and further settings go to the template.

    Raises: jinja2.TemplateError where the template refuses the messages, or what it does itself.
    """
    prompt, *completions = row
    how = template_settings | {"tools": json.loads(tools) if isinstance(tools, str) else tools}
    wholes = [_rendered(tokenizer, prompt + completion, **how) for completion in completions]
    return cut_at_seam(_rendered(tokenizer, prompt, add_generation_prompt=True, **how), wholes)


def cut_at_seam(prompt: list[int], wholes: Sequence[list[int]]) -> Encoded:
    """Each whole cut where the prompt, or what all of them share with it, ends.

    >>> cut_at_seam([1, 2, 3], [[1, 2, 3, 4], [1, 2, 7, 8]])
    Encoded(prompt=[1, 2], completions=([3, 4], [7, 8]), n_straddling=1)
    """
    length = min((_common(prompt, whole) for whole in wholes), default=len(prompt))
    completions = tuple(whole[length:] for whole in wholes)
    return Encoded(prompt[:length], completions, len(prompt) - length)


def check_rule(folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError for a run that was saved under another rule, where the rules differ.

    Runs saved before this rule encoded prompt and completion apart and never wrote a begin token.
    Where a tokenizer adds neither a begin token nor a space of its own, both rules give the same
    ids, but for the rows that `qlearn data check` counts, and the run is read.
    """
    if not os.path.isfile(os.path.join(folder, "qlearn.yaml")) or rule_of(folder) == RULE:
        return
    (first, second, both) = _plain(tokenizer, ["a", " b", "a b"])
    if begin_ids(tokenizer) or first + second != both:
        raise InputError(
            f"The run in {folder} was saved before rows were encoded as {RULE}: its texts lacked "
            "the begin token or had spaces that its tokenizer adds; train it again."
        )


def rule_of(folder: str) -> str | None:
    """The rule that a run's summary.json records, or None."""
    try:
        with open(os.path.join(folder, "summary.json"), encoding="utf-8") as file:
            return json.load(file).get("encoding")
    except (OSError, ValueError, AttributeError):
        return None


def _rendered(tokenizer, messages: list[dict], **how) -> list[int]:
    encoding = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **how)
    return list(encoding["input_ids"])


def _plain(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without what the tokenizer puts around it."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """How many first ids two rows share."""
    length = 0
    for a, b in zip(one, two, strict=False):
        if a != b:
            break
        length += 1
    return length
