"""Tiny tokenizers of the families that public models use, and a tiny Llama for any of them."""

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = [
    "The nurse asked the boss for a free day. He said no! She was torn, and then she was late.",
    "Question: is it late? Answer: yes, it is late! No? Not at all. a b c d e f g h.",
    "POST: my friend is late again. TL;DR: friend is late. Maybe he is. Maybe not...",
    "Be torn.\nBe late.\n  Is it? Isn't it?",
] * 20
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_level(ordinary: int, special: list[str]) -> Tokenizer:
    """Byte-level BPE whose special tokens stand behind all ordinary ones, so that "!" has id 0."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=ordinary, initial_alphabet=alphabet)
    )
    inner.add_special_tokens(special)
    return inner


def _sentencepiece(special: list[str], normalizer=None, pre_tokenizer=None) -> Tokenizer:
    inner = Tokenizer(models.BPE(unk_token=special[0]))
    if normalizer is not None:
        inner.normalizer = normalizer
    if pre_tokenizer is not None:
        inner.pre_tokenizer = pre_tokenizer
    inner.decoder = decoders.Metaspace()
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    return inner


def _framed(inner: Tokenizer, pattern: str) -> Tokenizer:
    """`pattern` is a template such as "<s> $A"."""
    marks = [(mark, inner.token_to_id(mark)) for mark in pattern.split() if mark != "$A"]
    inner.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=marks)
    return inner


def gpt2() -> PreTrainedTokenizerFast:
    """No padding token, nothing in front of a text; "!" has id 0."""
    end = "<|endoftext|>"
    inner = _byte_level(400, [end])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, bos_token=end)


def llama3() -> PreTrainedTokenizerFast:
    """Byte-level, without a padding token, and with a begin token that is not the end."""
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    inner = _framed(_byte_level(400, [begin, end]), f"{begin} $A")
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=begin, eos_token=end)


def qwen() -> PreTrainedTokenizerFast:
    """No begin token, an end of turn, a padding token of its own, a chat template."""
    end, pad = "<|im_end|>", "<|endoftext|>"
    inner = _byte_level(400, [pad, "<|im_start|>", end])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=end, pad_token=pad, chat_template=CHAT
    )


def llama(pattern: str = "<s> $A") -> PreTrainedTokenizerFast:
    """SentencePiece with a dummy prefix: every text begins with <s> and a space of its own."""
    inner = _sentencepiece(["<unk>", "<s>", "</s>"], pre_tokenizer=pre_tokenizers.Metaspace())
    return PreTrainedTokenizerFast(
        tokenizer_object=_framed(inner, pattern) if pattern else inner,
        unk_token="<unk>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip


def mistral() -> PreTrainedTokenizerFast:
    """As Llama's first tokenizer: the space is put in front by a normaliser, of every segment."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = pre_tokenizers.Split("▁", "merged_with_next")
    inner = _sentencepiece(["<unk>", "<s>", "</s>"], normalizer=spaces, pre_tokenizer=words)
    inner = _framed(inner, "<s> $A")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def gemma() -> PreTrainedTokenizerFast:
    """SentencePiece without a dummy prefix, with a begin token and a padding token at id 0."""
    inner = _sentencepiece(
        ["<unk>", "<pad>", "<bos>", "<eos>"],
        normalizer=normalizers.Replace(" ", "▁"),
        pre_tokenizer=pre_tokenizers.Split("▁", "merged_with_next"),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=_framed(inner, "<bos> $A"),
        unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
    )  # fmt: skip


def adds_end() -> PreTrainedTokenizerFast:
    """Begins a text with <s> and ends it with </s>."""
    return llama("<s> $A </s>")


FAMILIES = {f.__name__: f for f in (gpt2, llama3, qwen, llama, mistral, gemma, adds_end)}


def tiny_llama(tokenizer, seed: int = 0, extra_rows: int = 0) -> LlamaForCausalLM:
    """Two layers of width 64; `extra_rows` of the table belong to no token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + extra_rows, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, initializer_range=0.1, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save(folder, tokenizer, **how) -> str:
    """A directory with a tiny Llama and its tokenizer."""
    tiny_llama(tokenizer, **how).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
