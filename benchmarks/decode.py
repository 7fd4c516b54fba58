"""Decodes the slot world's posts with qlearn and with transformers' `generate`.

    python benchmarks/decode.py --json decode.json

Writes one object a decoder: seconds (best of three), peer_seconds, ratio = peer / ours. Both sides
must give the same tokens (sampling aside) before anything is timed. The model is tiny and has
random weights, so nearly every response has the full length: the gain from rows that leave the
batch as they end is not in these ratios. `pairs` draws two responses a prompt, as preference data
is drawn.
"""

import argparse
import json
import math
import time

import torch

from qlearn.lm.decode import Decoding, decode
from qlearn.lm.models import load_model
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.lm.worlds import SlotWorld

STEPS = 23


def model_and_prompts(n: int):
    tokenizer = load_tokenizer("slots")
    model = load_model("tiny", tokenizer, seed=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    return model, tokenizer, [post.prompt for post in SlotWorld().posts(n, "benchmark")]


def generate(model, tokenizer, prompts, **how) -> list[list[int]]:
    eos = tokenizer.eos_token_id
    inputs = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left",
        return_token_type_ids=False,
    )  # fmt: skip
    with torch.no_grad():
        out = model.generate(
            **inputs, **how, max_new_tokens=STEPS, eos_token_id=eos,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def best_of(function, n: int = 3) -> float:
    seconds = math.inf
    for _ in range(n):
        started = time.perf_counter()
        function()
        seconds = min(seconds, time.perf_counter() - started)
    return seconds


def measure(name, model, tokenizer, prompts, how: Decoding, peer: dict, check: bool) -> dict:
    def ours():
        return [d.tokens for d in decode(model, tokenizer, prompts, how)]

    def theirs():
        return generate(model, tokenizer, prompts, **peer)

    if check:
        same = sum(a == b for a, b in zip(ours(), theirs(), strict=True))
        assert same >= 0.98 * len(prompts), f"{name}: {same} of {len(prompts)} agree"
    seconds, peer_seconds = best_of(ours), best_of(theirs)
    return dict(
        decoder=name, prompts=len(prompts), seconds=seconds, peer_seconds=peer_seconds,
        ratio=peer_seconds / seconds,
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", required=True, help="where to write the measurements")
    path = parser.parse_args().json
    model, tokenizer, prompts = model_and_prompts(256)
    pairs = [prompt for prompt in prompts for _ in range(2)]
    draw = dict(do_sample=True, top_k=0)
    rows = [
        measure("sample", model, tokenizer, prompts, Decoding(max_new_tokens=STEPS), draw, False),
        measure("pairs", model, tokenizer, pairs, Decoding(max_new_tokens=STEPS), draw, False),
        measure(
            "greedy", model, tokenizer, prompts,
            Decoding(decoder="greedy", max_new_tokens=STEPS), dict(do_sample=False), True,
        ),
    ]  # fmt: skip
    for beams in (5, 20):
        how = Decoding(decoder="beam", beams=beams, max_new_tokens=STEPS)
        peer = dict(
            do_sample=False, num_beams=beams, length_penalty=0.0, early_stopping="never"
        )  # fmt: skip
        rows.append(measure(f"beam {beams}", model, tokenizer, prompts, how, peer, True))
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"threads": torch.get_num_threads(), "decoders": rows}, file, indent=1)
    for row in rows:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
