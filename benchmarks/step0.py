"""How far two scorings of one model differ at step 0 of DPO, and how far planted faults go.

    python benchmarks/step0.py --models pythia-14m --data pairs.jsonl --tokenizer DIR

For each model and precision one line each: the honest case, in batches as the reference's and pair
by pair, dropout 0.1, and a reference that is one update old. `share` is Σ |log π − log π_ref| over
32 responses as a share of Σ |log π_ref|, `max_share` the largest of one response. The bound in
`qlearn.train.step_0` rests on it.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from qlearn.lm.data import PREFERENCE_COLUMNS, encode
from qlearn.lm.models import load_model, no_dropout
from qlearn.lm.rows import read_rows
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.train import dpo, engine

PAIRS, SIZE = 16, 4


def set_dropout(model, rate: float) -> None:
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, rate)
        if isinstance(module, nn.Dropout):
            module.p = rate


def shares(model, pairs, ref_sums, dtype, size=SIZE) -> dict:
    """The share over all responses of `pairs` together, and the largest of a single one."""
    differences = []
    with engine.precision(model.device, dtype), torch.no_grad():
        for start in range(0, len(pairs), size):
            part = slice(start, start + size)
            _, chosen, rejected = dpo.pair_loss(model, pairs[part], ref_sums[part], 0.1)
            differences.append(torch.stack([chosen, rejected], dim=1).cpu() - ref_sums[part])
    off = torch.cat(differences).abs()
    total = off.sum() / ref_sums.abs().sum()
    return {"share": total.item(), "max_share": (off / ref_sums.abs()).max().item()}


def gradient_signs(model, pairs, ref_sums) -> list[torch.Tensor]:
    """The direction of Adam's first step on these pairs."""
    dpo.pair_loss(model, pairs, ref_sums, 0.1)[0].loss.mean().backward()
    signs = [p.grad.sign() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return signs


def step(model, signs, rate: float) -> None:
    with torch.no_grad():
        for p, sign in zip(model.parameters(), signs, strict=True):
            p.add_(sign, alpha=rate)


def measure(name: str, pairs, tokenizer, device: str) -> list[dict]:
    with torch.device(device):
        model = load_model(f"random:{name}", tokenizer, seed=1).to(device).train()
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        config = dpo.DPOConfig(
            model="tiny", data="slots", output_dir="-", per_device_train_batch_size=SIZE,
            dtype=str(dtype).removeprefix("torch."),
        )  # fmt: skip
        ref_sums = dpo.reference_sums(model, pairs, config)
        signs = gradient_signs(model, pairs[:SIZE], ref_sums[:SIZE])

        def add(what, size=SIZE, dtype=dtype, ref_sums=ref_sums):
            line = {"model": name, "dtype": str(dtype), "what": what}
            lines.append(line | shares(model, pairs, ref_sums, dtype, size))
            print(json.dumps(lines[-1]), flush=True)

        add("honest")
        add("honest, pair by pair", size=1)
        set_dropout(model, 0.1)
        add("dropout 0.1")
        no_dropout(model)
        for rate in (1e-6, 1e-5):
            step(model, signs, -rate)
            add(f"reference one update old, learning rate {rate:g}")
            step(model, signs, rate)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["pythia-14m"])
    parser.add_argument("--data", required=True, help="JSONL with prompt, chosen, rejected")
    parser.add_argument("--tokenizer", default="EleutherAI/pythia-14m")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    rows = read_rows(options.data, PREFERENCE_COLUMNS)[:PAIRS]
    pairs, _ = encode(rows, PREFERENCE_COLUMNS, tokenizer, 2048)
    found = [line for name in options.models for line in measure(name, pairs, tokenizer,
                                                                  options.device)]  # fmt: skip
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
