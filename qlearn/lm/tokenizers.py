"""Tokenizers: an embedded world's, any directory's, any hub id's; and which belong together."""

import os

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlearn.errors import InputError
from qlearn.lm.grammar import EOS, MARKS, PAD
from qlearn.lm.pretrained import from_pretrained, tokenizer_source
from qlearn.lm.worlds import GRAMMARS, World


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer called `name`: an embedded world's ("slots", "trips"), a directory, a hub id.

    A directory may hold nothing but `tokenizer.json`. The padding token is never the end of text.

    Raises: InputError for an unreachable hub or a directory without a tokenizer.
    """
    if name in {grammar.name for grammar in GRAMMARS.values()}:
        return world_tokenizer(World(name))
    name = tokenizer_source(name)
    lone = os.path.join(name, "tokenizer.json")
    if os.path.isfile(lone) and not os.path.isfile(os.path.join(name, "tokenizer_config.json")):
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=lone, eos_token=EOS, bos_token=EOS)
    else:
        tokenizer = from_pretrained(AutoTokenizer, name, "tokenizer")
    if tokenizer.eos_token_id is None:
        raise InputError(f"The tokenizer {name} has no end-of-text token, so no response can end.")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # Pythia's tokenizer has a padding token that its configuration does not name. Elsewhere
        # padding is never read (masks come from lengths), so any id but the end of text will do.
        has_pad = tokenizer.convert_tokens_to_ids(PAD) not in (None, tokenizer.unk_token_id)
        other = tokenizer.convert_ids_to_tokens(int(tokenizer.eos_token_id == 0))
        tokenizer.pad_token = PAD if has_pad else other
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
    if model == "tiny" or model.startswith("random:"):
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


def check_same_tokenizer(policy: PreTrainedTokenizerBase, judge: PreTrainedTokenizerBase) -> None:
    """Raises InputError unless both tokenizers give the same ids to the same tokens."""
    if policy.get_vocab() != judge.get_vocab():
        raise InputError(
            f"The policy's tokenizer ({len(policy)} tokens) and the reward model's ({len(judge)}) "
            "are not the same, so the reward model would read other words than were written; train "
            "it from a model of the policy's family."
        )
