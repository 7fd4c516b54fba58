"""Small tokenizers of several families, and tiny models that read them, for the inspector."""

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

TEXT = [
    "The cat sat on the mat. It was great. Really great. She said hello, world.",
    "Question: what is the best way to learn? Answer: practise every day, and rest.",
]


def byte_level():
    """Like GPT-2's: bytes are the alphabet, so an emoji is four tokens and none of them is text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(TEXT, trainer)
    return _wrapped(inner, "<|endoftext|>", pad="<|pad|>")


def metaspace():
    """Like Llama's: "▁" for a space, and one in front of every text; an emoji is unknown."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    inner.train_from_iterator(TEXT, trainer)
    return _wrapped(inner, "</s>", pad="<pad>", unk_token="<unk>")


def byte_fallback():
    """Like Mistral's: "▁" for a space, and bytes such as <0xF0> for what is not in its table."""
    letters = "▁abcdefghijklmnopqrstuvwxyz.,!TQA"
    words = ["<unk>", "</s>", "<pad>", *(f"<0x{i:02X}>" for i in range(256)), *letters]
    table = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.BPE(table, [], unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return _wrapped(inner, "</s>", pad="<pad>", unk_token="<unk>")


FAMILIES = {"byte_level": byte_level, "metaspace": metaspace, "byte_fallback": byte_fallback}


def save_pair(folder, tokenizer, initializer_range: float = 0.1) -> None:
    """folder/policy and folder/reference: two tiny GPT-2s with this tokenizer, without a β."""
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=256,
            initializer_range=initializer_range, bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _wrapped(inner, eos: str, pad: str, **special):
    inner.add_special_tokens([eos, pad])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=eos, bos_token=eos, pad_token=pad, **special
    )
