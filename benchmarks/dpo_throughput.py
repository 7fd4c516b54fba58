"""Pairs a second of DPO training, each way of computing it in a process of its own.

    python benchmarks/dpo_throughput.py --model pythia-14m --data pairs.jsonl --tokenizer DIR \
        --ways plain shared grouped trl-1 trl-2 --json throughput.json

Weights are random at a Pythia shape; rows are real. Reference sums are computed before the clock
starts, by all alike, from another seed's weights, and the loss of the first update is reported so
that the ways can be compared. An update is always the same `--update` pairs.

  plain      two rows a pair, each with its own copy of the prompt, 4 pairs a pass
  shared     chosen and rejected behind one prompt (`qlearn.lm.shared_prompt`), 4 pairs a pass
  grouped    the same in passes of like length within `--budget` tokens (`qlearn.train.passes`)
  masters    the same with bfloat16 weights beside float32 masters (`qlearn.train.masters`)
  compiled   the same with each layer compiled
  trl-N      TRL's DPOTrainer, N pairs a pass, reference precomputed, no checkpointing

`plain-N` and `shared-N` put N pairs in a pass. `--dtype bfloat16` is autocast for all ways.
Seconds are medians over updates after `--warm` untimed ones.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from qlearn import losses
from qlearn.lm.data import PREFERENCE_COLUMNS, as_pairs, encode, read_rows
from qlearn.lm.logprobs import collate, completion_logps, sum_logps
from qlearn.lm.models import SHAPES, load_model
from qlearn.lm.shared_prompt import collate_shared, shared_logps
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.train.masters import Masters
from qlearn.train.passes import passes

BETA, RATE = 0.1, 1e-6
SHARED = ("shared", "grouped", "masters", "compiled")


def main() -> None:
    options = read_options()
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return
    found = {"model": options.model, "data": Path(options.data).name, "pairs": options.pairs,
             "update": options.update, "budget": options.budget, "dtype": options.dtype,
             "machine": machine(options.device), "ways": {}}  # fmt: skip
    for way in options.ways:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            found["ways"][way] = {"error": done.stderr.strip()[-600:]}
        else:
            found["ways"][way] = json.loads(done.stdout.splitlines()[-1])
        print(way, found["ways"][way], file=sys.stderr, flush=True)
        if options.json:  # after each way, so that a stopped run loses nothing
            Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pythia-14m", choices=list(SHAPES))
    parser.add_argument("--data", required=True, help="JSONL with prompt, chosen, rejected")
    parser.add_argument("--tokenizer", default="EleutherAI/pythia-14m")
    parser.add_argument("--ways", nargs="+", default=["plain", "shared", "grouped"])
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, default=512, help="the first pairs of the data")
    parser.add_argument("--update", type=int, default=64, help="pairs in an update")
    parser.add_argument("--updates", type=int, default=5, help="timed updates")
    parser.add_argument("--warm", type=int, default=1, help="untimed updates before them")
    parser.add_argument("--budget", type=int, default=4096, help="tokens in a grouped pass")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--profile", action="store_true", help="where the last update's time goes")
    parser.add_argument("--json")
    return parser.parse_args()


def machine(device: str) -> dict:
    card = torch.cuda.get_device_name() if device == "cuda" else None
    return {"card": card, "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(), "torch": torch.__version__}  # fmt: skip


def measure(way: str, options: argparse.Namespace) -> dict:
    tokenizer = load_tokenizer(options.tokenizer)
    rows = read_rows(options.data, PREFERENCE_COLUMNS)[: options.pairs]
    pairs, faults = encode(rows, PREFERENCE_COLUMNS, tokenizer, 2048)
    model = random_model(options, tokenizer, seed=1)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays float32 on a GPU
    name, _, number = way.partition("-")
    measured = (trl_updates if name == "trl" else our_updates)(
        name, int(number or 4), model, pairs, [row for _, row in rows], tokenizer, options
    )
    useful = sum(useful_flops(pair, SHAPES[options.model]) for pair in pairs) / len(pairs)
    seconds = measured.pop("seconds")[options.warm :]
    speed = options.update / statistics.median(seconds)
    peak = gemm_peak(options.device, options.dtype)
    return {
        "pairs_per_second": speed, "update_seconds": seconds, **measured,
        "useful_gflop_a_pair": useful / 1e9, "gemm_tflops": peak / 1e12,
        "share_of_gemm_peak": speed * useful / peak, "faults": len(faults),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_card_gib": torch.cuda.max_memory_allocated() / 2**30
        if options.device == "cuda" else None,
    }  # fmt: skip


def random_model(options, tokenizer, seed: int):
    with torch.device(options.device):  # 2.8B random numbers take a minute on a CPU
        return load_model(f"random:{options.model}", tokenizer, seed=seed).to(options.device)


def our_updates(name, size, model, pairs, rows, tokenizer, options) -> dict:
    """Seconds of each update, and the first update's loss."""
    device = options.device
    autocast = torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bfloat16")
    references = reference_sums(tokenizer, pairs, options)
    masters = Masters(model) if name in ("masters", "compiled") else None
    weights = masters.parameters if masters else list(model.parameters())
    optimiser = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0, fused=True)
    if name == "compiled":
        for layer in model.base_model.layers:
            layer.compile(dynamic=True)
    seconds, first = [], None
    updates = updates_of(len(pairs), options)
    profiler = torch.profiler.profile() if options.profile else None
    for number, update in enumerate(updates, start=1):
        if profiler and number == len(updates):
            profiler.start()
        started = clock(device)
        total = torch.zeros((), device=device)
        for part in split(name, size, [pairs[i] for i in update], options.budget):
            ids = [update[i] for i in part]
            with autocast:
                chosen, rejected = pair_sums(name, model, [pairs[i] for i in ids])
            ref_chosen, ref_rejected = references[ids].to(device, non_blocking=True).unbind(1)
            out = losses.dpo(chosen, rejected, ref_chosen, ref_rejected, BETA)
            loss = out.loss.sum() / len(update)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=masters is None)
        if masters:
            masters.publish()
        first = total.item() if first is None else first
        seconds.append(clock(device) - started)
    if profiler:
        profiler.stop()
        seconds.pop()  # the profiler slows what it watches
    return {"seconds": seconds, "first_loss": first, "kernels": kernels(profiler)}


def kernels(profiler) -> dict[str, float]:
    """The share of the device's busy time that each of the 20 longest kernels takes."""
    if profiler is None:
        return {}
    events = profiler.key_averages()
    on = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    busy = {event.key: getattr(event, on) for event in events}
    total = sum(busy.values())
    longest = sorted(busy, key=busy.get, reverse=True)[:20]
    return {name[:90]: round(busy[name] / total, 4) for name in longest}


def split(name, size, update, budget) -> list[list[int]]:
    if name in ("grouped", "masters", "compiled"):
        return passes([len(p.prompt) + sum(map(len, p.completions)) for p in update], budget)
    return [list(range(len(update)))[i : i + size] for i in range(0, len(update), size)]


def pair_sums(name, model, pairs):
    """log π of the chosen and of the rejected completions, (B,) each."""
    if name in SHARED:
        batch = collate_shared([(p.prompt, p.completions) for p in pairs]).to(model.device)
        return shared_logps(model, batch)[0].sum(-1)
    batch = collate(as_pairs(pairs, 0) + as_pairs(pairs, 1), model.device)
    return completion_logps(model, batch)[0].sum(1).chunk(2)


def reference_sums(tokenizer, pairs, options) -> torch.Tensor:
    """log π_ref of both completions, (pairs, 2), from another seed's weights."""
    reference = random_model(options, tokenizer, seed=2)
    with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
        sums = [sum_logps(reference, as_pairs(pairs, k), 8) for k in (0, 1)]
    return torch.stack(sums, dim=1)


def updates_of(n: int, options) -> list[list[int]]:
    """The pairs of each update, in the data's order, starting again where the data ends."""
    total = (options.warm + options.updates) * options.update
    order = [i % n for i in range(total)]
    return [order[i : i + options.update] for i in range(0, total, options.update)]


def trl_updates(name, size, model, pairs, rows, tokenizer, options) -> dict:
    """The same for TRL's trainer; its clock runs from one optimiser step to the next."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    order = [i for update in updates_of(len(rows), options) for i in update]
    reference = random_model(options, tokenizer, seed=2)
    times, first_losses = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(clock(options.device))

        def on_train_end(self, *args, **kwargs):
            times.append(clock(options.device))

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in (logs or {}):
                first_losses.append(logs["loss"])

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            model, ref_model=reference,
            args=trl.DPOConfig(
                output_dir=folder, beta=BETA, learning_rate=RATE, max_length=None,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=options.update // size,
                max_steps=options.warm + options.updates, bf16=options.dtype == "bfloat16",
                use_cpu=options.device == "cpu", gradient_checkpointing=False,
                precompute_ref_log_probs=True, report_to=[], save_strategy="no", logging_steps=1,
                disable_tqdm=True, dataloader_drop_last=True, max_grad_norm=1.0,
                train_sampling_strategy="sequential",
            ),
            train_dataset=Dataset.from_list([rows[i] for i in order]),
            processing_class=tokenizer, callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    seconds = [b - a for a, b in itertools.pairwise(times)]
    return {"seconds": seconds, "first_loss": float(first_losses[0])}


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def useful_flops(pair, shape) -> float:
    """Forward and backward of one pair: the prompt once, no padding, the head where it is needed.

    A weight costs 2 FLOPs a token and pass, and a backward pass is two; an attention score and its
    use cost 4 · width a pair of tokens and layer.
    """
    prompt, ends = len(pair.prompt), [len(ids) for ids in pair.completions]
    tokens = prompt + sum(ends)
    body = 12 * shape.layers * shape.width**2 * 2 * tokens
    pairs_of_tokens = prompt**2 / 2 + sum(n * prompt + n**2 / 2 for n in ends)
    attention = 4 * shape.layers * shape.width * pairs_of_tokens
    head = 2 * shape.vocabulary * shape.width * sum(ends)
    return 3 * (body + attention + head)


def gemm_peak(device: str, dtype: str) -> float:
    """The best FLOPs a second of square products here, in the precision of the run."""
    kind, best = getattr(torch, dtype), 0.0
    for n in (1024, 2048) if device == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
        for _ in range(6):
            started = clock(device)
            for _ in range(3):
                a @ b
            best = max(best, 3 * 2 * n**3 / (clock(device) - started))
    return best


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
