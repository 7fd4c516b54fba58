"""Tokenizers: an embedded world's, any directory's, any hub id's; and which belong together."""

import os

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlearn.errors import InputError
from qlearn.lm.encoding import begin_ids, check_rule
from qlearn.lm.grammar import EOS, MARKS, PAD
from qlearn.lm.model_files import has_tokenizer, is_shape, tokenizer_source
from qlearn.lm.pretrained import from_pretrained
from qlearn.lm.worlds import GRAMMARS, World

# Texts in which tokenizers differ: case, spaces, line breaks, digits, marks, letters, an emoji.
PROBE = (
    "The nurse said: No! She's 31,415 days late...", "  two  spaces\tand\n\na break \r\n",
    "UPPER lower CamelCase snake_case", "naïve Straße Ωmega Привет 日本語 العربية", "😀 \u200b½ﬁ",
    "def f(x):\n    return x != 3.14e-10  # https://a.b/c?d=e",
)  # fmt: skip


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer called `name`: an embedded world's ("slots", "trips"), a directory, a hub id.

    A directory may hold nothing but `tokenizer.json`. A tokenizer without a padding token gets
    none: batches are padded by lengths and masks, so that no ordinary token need be made special.

    Raises: InputError for an unreachable hub, a directory without a tokenizer, or a run whose rows
    were encoded by another rule.
    """
    if name in {grammar.name for grammar in GRAMMARS.values()}:
        return world_tokenizer(World(name))
    if is_shape(name):
        raise InputError(f"The model {name} has no tokenizer of its own; pass --tokenizer.")
    folder, name = name, tokenizer_source(name)
    lone = os.path.join(name, "tokenizer.json")
    if os.path.isfile(lone) and not os.path.isfile(os.path.join(name, "tokenizer_config.json")):
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=lone, eos_token=EOS, bos_token=EOS)
        if PAD in tokenizer.get_vocab():
            tokenizer.pad_token = PAD
    else:
        tokenizer = from_pretrained(AutoTokenizer, name, "tokenizer")
    if tokenizer.eos_token_id is None:
        raise InputError(f"The tokenizer {name} has no end-of-text token, so no response can end.")
    check_rule(folder, tokenizer)
    return tokenizer


def world_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """One token a word and a punctuation mark of an embedded world."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = world.vocabulary()
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=PAD))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    # Each token but the first is given a leading space, which marks lose again.
    unspaced = [decoders.Replace(f" {mark}", mark) for mark in MARKS]
    inner.decoder = decoders.Sequence([decoders.WordPiece(cleanup=False), *unspaced])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=EOS, bos_token=EOS, pad_token=PAD, unk_token=PAD
    )


def default_tokenizer(model: str, data: str) -> str:
    """The tokenizer meant when none is named: the world's for a world, else the model's own."""
    if is_shape(model):
        if data in GRAMMARS:
            return GRAMMARS[data].name
        raise InputError(f"The model {model} has no tokenizer of its own; pass --tokenizer.")
    return model


def check_knows(tokenizer: PreTrainedTokenizerBase, world: World) -> None:
    """Raises InputError where `world` has a word that `tokenizer` can only call unknown."""
    words = world.vocabulary()[2:]  # without the end and the padding
    ids = tokenizer(words, add_special_tokens=False).input_ids
    unknown = [w for w, known in zip(words, ids, strict=True) if tokenizer.unk_token_id in known]
    if unknown:
        raise InputError(
            f"The tokenizer does not know {len(unknown)} words of the world {world.variant}, "
            f"{unknown[0]!r} for one; take a model trained on that world, or --tokenizer "
            f"{world.grammar.name}."
        )


def own_tokenizer(
    name: str, tokenizer: PreTrainedTokenizerBase, role: str, given: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of the model called `name`, which is a `role` beside the policy.

    It is `tokenizer` itself for a model made from a shape, and for a directory without one where
    the user has named a tokenizer for all (`given`).

    Raises: InputError where it is not the policy's, or is missing.
    """
    bare = os.path.isdir(name) and not has_tokenizer(name)
    if is_shape(name) or (given and bare):
        return tokenizer
    other = load_tokenizer(name)
    check_same_tokenizer(tokenizer, other, role)
    return other


def check_same_tokenizer(
    policy: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, role: str
) -> None:
    """Raises InputError unless two tokenizers do the same, naming the first difference.

    Compared are the tokens and their ids, how a text begins and ends, and the ids of a probe of
    texts, among them the text of every token: a merge that only one of them knows shows there. A
    special token that only one has is lawful, since no row may hold it, and is explained in a note.
    What is never read is not compared: the padding token, a chat template, the size of a model's
    table.

    `role` is what the other tokenizer's model is to the policy, as "reference".
    """
    difference = first_difference(policy, other)
    if difference is not None:
        raise InputError(
            f"The policy's tokenizer and the {role}'s are not the same: {difference}; two models "
            "compare only where they read the same tokens, so take both from one family."
        )
    extra = sorted(policy.get_vocab().keys() ^ other.get_vocab().keys())
    if extra:
        print(
            f"note: only one of the tokenizers of policy and {role} has the special token "
            f"{', '.join(extra)}; no row can hold it, so the two compare all the same."
        )


def first_difference(one: PreTrainedTokenizerBase, two: PreTrainedTokenizerBase) -> str | None:
    """The first thing that two tokenizers do differently, in words, `one` named first; or None."""
    if one.is_fast and two.is_fast and one.eos_token == two.eos_token:
        one_json, two_json = (x.backend_tokenizer.to_str() for x in (one, two))
        if one_json == two_json:
            return None
    tokens = [{i: token for token, i in x.get_vocab().items()} for x in (one, two)]
    unread = [_unread(x) for x in (one, two)]
    for i in sorted(tokens[0].keys() | tokens[1].keys()):
        first, second = (x.get(i) for x in tokens)
        lawful = (second is None and first in unread[0]) or (first is None and second in unread[1])
        if first != second and not lawful:
            return f"token {i} is {_named(first)} in the one and {_named(second)} in the other"
    if one.eos_token_id != two.eos_token_id:
        return f"the one ends a text with {one.eos_token} and the other with {two.eos_token}"
    begins = [x.convert_ids_to_tokens(begin_ids(x)) for x in (one, two)]
    if begins[0] != begins[1]:
        first, second = (" ".join(begin) or "nothing" for begin in begins)
        return f"the one begins a text with {first} and the other with {second}"
    shared = sorted(tokens[0].keys() & tokens[1].keys())
    texts = [*PROBE, *one.batch_decode([[i] for i in shared])]
    ids = [x(texts, add_special_tokens=False, verbose=False).input_ids for x in (one, two)]
    for text, first, second in zip(texts, *ids, strict=True):
        if first != second:
            left = " ".join(one.convert_ids_to_tokens(first)[:8])
            right = " ".join(two.convert_ids_to_tokens(second)[:8])
            return f"the text {text[:40]!r} becomes {left} in the one and {right} in the other"
    return None


def _unread(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The special tokens that no row holds: text with one is refused, so only a template's are."""
    template = str(tokenizer.chat_template or "")
    special = {x.content for x in tokenizer.added_tokens_decoder.values() if x.special}
    return {token for token in special if token not in template}


def _named(token: str | None) -> str:
    return "missing" if token is None else repr(token)
