"""Per-token log-probabilities of completions: the one hot path of training and analysis.

Only the positions that predict a completion token pass through the vocabulary head; at Pythia-14m
the head is 84 % of the forward matrix products and prompts are nine tenths of the positions. Rows
are padded on the right and no attention mask is passed, which is exact for a causal model because
no real token can see what stands to its right, and keeps the fast causal kernel. Masks come from
lengths, never from token ids, so an end-of-text token is scored like any other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


class Batch(NamedTuple):
    """Prompts and completions in one right-padded table.

    input_ids (B, S); prompt_lengths and completion_lengths (B,), both at least 1, in tokens.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    completion_lengths: Tensor


Row = tuple[list[int], list[int]]  # prompt ids, completion ids


def collate(rows: Sequence[Row], device: str | torch.device = "cpu") -> Batch:
    """Rows (prompt ids, completion ids) as one batch; what stands beyond a row is never read."""
    prompts = torch.tensor([len(p) for p, _ in rows])
    completions = torch.tensor([len(c) for _, c in rows])
    if not (len(rows) and prompts.min() > 0 and completions.min() > 0):
        raise ValueError("Each row needs at least one prompt token and one completion token.")
    ids = torch.zeros(len(rows), int((prompts + completions).max()), dtype=torch.int64)
    for row, (p, c) in zip(ids, rows, strict=True):
        row[: len(p) + len(c)] = torch.tensor(p + c)
    return Batch(ids.to(device), prompts.to(device), completions.to(device))


def completion_logps(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """log π(y_j | x, y_<j) for every completion token: (B, T) in nats, and its mask (B, T).

    float32 from the head on, whatever the body computes in; 0 where the mask is 0.
    T is the longest completion of the batch.

    Source: the factors of Eqs 8 and 9; `eq-chain-rule` in the book.
    """
    return logps_of_states(model, batch, completion_states(model, batch))


def logps_of_states(model: PreTrainedModel, batch: Batch, states: Tensor) -> tuple[Tensor, Tensor]:
    """`completion_logps` where the body has been run: `states` (N, D) of `completion_states`."""
    mask = completion_mask(batch)
    targets = batch.input_ids[_positions(batch, mask, shift=0)]
    return as_table(target_logps(head_logits(model, states), targets), mask), mask.long()


def completion_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The logits (N, V), float32, that predict the batch's N completion tokens, row after row."""
    return head_logits(model, completion_states(model, batch))


def completion_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The body's states (N, D) in which the batch's N completion tokens are chosen, row by row."""
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    # shift: the state at position t predicts the token at t + 1
    return hidden[_positions(batch, completion_mask(batch), shift=-1)]


def head_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """The vocabulary head's logits (N, V), at least float32 whatever the body computes in."""
    head = model.get_output_embeddings()
    dtype = torch.promote_types(states.dtype, torch.float32)
    with torch.autocast(states.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.to(dtype)
        return F.linear(states.to(dtype), head.weight.to(dtype), bias)


def target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """log π of each state's target token: logits (N, V) and ids (N,) to (N,), in nats.

    Overwrites `logits` in the backward pass, so that one table of N · V numbers is all that lives.

    >>> target_logps(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([2])).exp().item()
    0.25
    """
    return _TargetLogps.apply(logits, targets)


class _TargetLogps(torch.autograd.Function):
    """logit[target] − logsumexp(logits); its gradient is onehot(target) − softmax(logits)."""

    @staticmethod
    def forward(ctx, logits, targets):
        total = logits.logsumexp(dim=-1)  # (N,)
        ctx.save_for_backward(logits, targets, total)
        return logits.gather(1, targets[:, None])[:, 0] - total

    @staticmethod
    def backward(ctx, gradient):
        logits, targets, total = ctx.saved_tensors
        table = logits.sub_(total[:, None]).exp_().mul_(-gradient[:, None])  # (N, V), in place
        return table.scatter_add_(1, targets[:, None], gradient[:, None]), None


def sum_logps(model: PreTrainedModel, rows: Sequence[Row], batch_size: int) -> Tensor:
    """log π(y | x) of every row (prompt ids, completion ids), without gradients: (len(rows),).

    Rows are scored in order of length, to pad little, and come back in the order given.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    sums = torch.zeros(len(rows))
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            part = order[start : start + batch_size]
            batch = collate([rows[i] for i in part], model.device)
            sums[part] = completion_logps(model, batch)[0].sum(dim=1).cpu()
    return sums


def completion_mask(batch: Batch) -> Tensor:
    """Where a row has completion tokens: (B, T), bool, from lengths and never from token ids."""
    steps = torch.arange(int(batch.completion_lengths.max()), device=batch.input_ids.device)
    return steps < batch.completion_lengths[:, None]


def as_table(numbers: Tensor, mask: Tensor) -> Tensor:
    """N numbers, row after row, as a table of the mask's shape that is 0 where it is."""
    return numbers.new_zeros(mask.shape).masked_scatter(mask, numbers)


def _positions(batch: Batch, mask: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    rows, steps = mask.nonzero(as_tuple=True)
    return rows, batch.prompt_lengths[rows] + steps + shift
