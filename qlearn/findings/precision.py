"""How much of a heat map is rounding: log-ratios in half precision, measured against float32.

A token's credit is a small difference of two large numbers, β (log π − log π_ref), so bfloat16 can
hide it: at 135 million parameters the error of a token's log-ratio had a standard deviation of 0.07
nats, beside credits of 0.185. Models are therefore read in float32; where memory or the user
asks for less, the error is measured on the user's own tokens. A second pass in bfloat16 is the
same bit for bit and would show none.
"""

import copy
import math
import os
from collections.abc import Sequence
from glob import glob
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlearn.lm.logprobs import Row, collate, completion_logps

AT_LEAST = 64  # tokens that a noise is measured on
BATCH = 16  # rows in one forward pass
HEADROOM = 1.2  # activations and what else runs, as a factor on the weights


class Noise(NamedTuple):
    """The error of log π − log π_ref against float32, in nats.

    n_tokens: how many were measured. std: root mean square error of a token. p95: what 95 % of the
    errors stay below in size: a smaller log-ratio cannot be told from 0. sum_std: root mean square
    error of a response's sum, at the responses' mean `length` in tokens; `of_sum` for another.
    """

    n_tokens: int
    std: float
    p95: float
    sum_std: float
    length: float

    def of_sum(self, n_tokens: int) -> float:
        """The error to expect of a sum of `n_tokens` log-ratios, in nats: it grows as √n."""
        return self.sum_std * math.sqrt(n_tokens / self.length)


def log_ratio_noise(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    rows: Sequence[Row],
    dtype: torch.dtype,
    at_least: int = AT_LEAST,
) -> Noise:
    """How far log π − log π_ref in `dtype` is from float32 on rows (prompt ids, completion ids).

    The models stay as they are; give them with float32 weights, as `load_model` does, so that the
    rounding of the weights counts too. Where memory forbids that they may come in `dtype`: then
    each in turn is copied to float32. Where the completions have fewer than `at_least` tokens, the
    prompts' tokens are measured as well; `Noise.n_tokens` says how many there were in the end.

    Raises: ValueError without rows, or where dtype is float32, which has no error against itself.
    """
    if dtype == torch.float32 or not rows:
        raise ValueError("A noise needs rows, and a dtype other than float32.")
    measured = with_prompts(rows) if sum(len(c) for _, c in rows) < at_least else list(rows)
    ratio = {}
    for precise in (True, False):
        wanted = torch.float32 if precise else dtype
        logp, ref_logp = (_logps(model, measured, wanted) for model in (policy, reference))
        ratio[precise] = [p - ref for p, ref in zip(logp, ref_logp, strict=True)]
    errors = [low - high for low, high in zip(ratio[False], ratio[True], strict=True)]  # (T,) each
    each = torch.cat(errors)
    std = each.square().mean().sqrt().item()
    # Independent errors add up as √T. Some are not (a bias), so the rows' own sums may say more.
    per_root = [e.sum().item() ** 2 / len(e) for e in errors]
    root = max(std, math.sqrt(sum(per_root) / len(per_root)))
    length = sum(len(c) for _, c in rows) / len(rows)
    p95 = each.abs().quantile(0.95).item()
    return Noise(len(each), std, p95, root * math.sqrt(length), length)


def with_prompts(rows: Sequence[Row]) -> list[Row]:
    """The same rows with all tokens but the first to be scored, each distinct prompt's once."""
    longer, known = [], set()
    for prompt, completion in rows:
        if tuple(prompt) in known:
            longer.append((prompt, completion))
        else:
            longer.append((prompt[:1], [*prompt[1:], *completion]))
        known.add(tuple(prompt))
    return longer


def lower(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model with its weights in `dtype`, in place.

    Buffers keep their precision, as in `from_pretrained`: rotary frequencies in bfloat16 would put
    a token at another place.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def enough_memory_for_float32(folders: Sequence[str], device: torch.device) -> bool:
    """Whether the weights in these directories fit in the device's free memory as float32.

    True where that cannot be known: a hub id, a checkpoint that is not safetensors, another device.
    """
    from safetensors import safe_open

    numbers = 0
    for folder in folders:
        for path in glob(os.path.join(folder, "*.safetensors")):
            with safe_open(path, framework="pt") as file:
                numbers += sum(math.prod(file.get_slice(k).get_shape()) for k in file.keys())  # noqa: SIM118
    free = free_memory(device)
    return free is None or 4 * numbers * HEADROOM <= free


def free_memory(device: torch.device) -> int | None:
    """Free bytes of the device, None where that cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in file}
        return 1024 * kilobytes["MemAvailable"]
    except (OSError, KeyError, ValueError):
        return None


def _logps(model: PreTrainedModel, rows: Sequence[Row], dtype: torch.dtype) -> list[Tensor]:
    """log π of the completion tokens of each row, (T,) on the CPU, with the weights in `dtype`."""
    if next(model.parameters()).dtype != dtype:
        model = lower(copy.deepcopy(model), dtype)
    found = []
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            batch = collate(rows[start : start + BATCH], model.device)
            logp, mask = completion_logps(model, batch)
            lengths = mask.sum(dim=1).tolist()
            found += [row[:n].double() for row, n in zip(logp.cpu(), lengths, strict=True)]
    return found
