"""One prompt, several completions, one pass: the prompt of a preference pair is read once.

A row is [prompt | y_1 | ... | y_K | padding]. Each completion sees the prompt and itself, its
positions start where the prompt ends, and the prompt's last state chooses the first token of every
completion. So a row has P + C + R tokens where two rows of prompt and completion have 2P + C + R;
on TL;DR, whose prompts are nine tenths of a row, that is about half of the work.

The plain path, `logprobs.completion_logps` on K rows a prompt, stays as the readable reference.
Not every architecture obeys the mask (ALiBi counts distances in the row, a recurrent body reads
everything): `largest_difference` measures one on short rows, and `takes_shared_prompts` decides.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlearn.lm.logprobs import as_table, collate, completion_logps, head_logits, target_logps

PromptRow = tuple[list[int], Sequence[list[int]]]  # prompt ids; the ids of K completions
TOLERANCE = 1e-4  # nats a response: what float32 rounding explains on the probe's short rows


class SharedBatch(NamedTuple):
    """B prompts with K completions each in one right-padded table.

    input_ids (B, S); position_ids (B, S), which restart at the prompt's end in each completion;
    branch (B, S): 0 on the prompt, k on completion k, −1 on padding; mask (K, B, T): where there
    are completion tokens, N in all; states (N,): for each of them, in the mask's order, the place
    in B · S of the state that chooses it; targets (N,): their ids.
    """

    input_ids: Tensor
    position_ids: Tensor
    branch: Tensor
    mask: Tensor
    states: Tensor
    targets: Tensor

    def to(self, device: str | torch.device) -> "SharedBatch":
        return SharedBatch(*(x.to(device, non_blocking=True) for x in self))


def collate_shared(rows: Sequence[PromptRow], device: str | torch.device = "cpu") -> SharedBatch:
    """Prompts with their K completions as one batch; all index arithmetic is done on the CPU.

    >>> batch = collate_shared([([5, 6], ([7, 8], [9]))])
    >>> batch.input_ids.tolist(), batch.position_ids.tolist(), batch.branch.tolist()
    ([[5, 6, 7, 8, 9]], [[0, 1, 2, 3, 2]], [[0, 0, 1, 1, 2]])
    >>> batch.states.tolist(), batch.targets.tolist()  # the 6 chooses the 7 and the 9
    ([1, 2, 1], [7, 8, 9])

    Raises: ValueError for no rows, an empty prompt or completion, or rows of unlike K.
    """
    prompts = torch.tensor([len(prompt) for prompt, _ in rows])  # (B,)
    counts = {len(completions) for _, completions in rows}
    if len(counts) != 1:
        raise ValueError(f"All prompts need the same number of completions, not {sorted(counts)}.")
    lengths = torch.tensor([[len(y) for y in completions] for _, completions in rows]).T  # (K, B)
    if not (lengths.numel() and prompts.min() > 0 and lengths.min() > 0):
        raise ValueError("Each row needs at least one prompt token and one token a completion.")

    ends = prompts + lengths.cumsum(dim=0)  # (K, B): where each completion ends in its row
    starts = ends - lengths
    width = int(ends[-1].max())  # S
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    position_ids = torch.arange(width).repeat(len(rows), 1)
    branch = torch.full((len(rows), width), -1)
    for i, (prompt, completions) in enumerate(rows):
        ids = prompt + [token for y in completions for token in y]
        input_ids[i, : len(ids)] = torch.tensor(ids)
        branch[i, : len(prompt)] = 0
        for k, (start, end) in enumerate(zip(starts[:, i], ends[:, i], strict=True)):
            branch[i, start:end] = k + 1
            position_ids[i, start:end] -= start - len(prompt)

    steps = torch.arange(int(lengths.max()))  # (T,)
    mask = steps < lengths[:, :, None]  # (K, B, T)
    token = starts[:, :, None] + steps  # (K, B, T): where each completion token stands
    # the token before chooses it; before a completion's first token that is the prompt's last
    state = torch.where(steps == 0, prompts[:, None] - 1, token - 1)
    row = torch.arange(len(rows))[:, None] * width
    states, tokens = (row + state)[mask], (row + token)[mask]  # (N,)
    batch = SharedBatch(
        input_ids, position_ids, branch, mask, states, input_ids.flatten()[tokens]
    )  # fmt: skip
    return batch.to(device)


def visible(branch: Tensor) -> Tensor:
    """Who may look at whom: (B, S) to (B, 1, S, S), True where the column is in the row's past.

    A token's past is what stands before it in the prompt and in its own completion.
    """
    n = branch.shape[1]
    before = torch.ones(n, n, dtype=torch.bool, device=branch.device).tril()
    prompt = (branch == 0)[:, None, :]  # (B, 1, S)
    same = branch[:, :, None] == branch[:, None, :]  # (B, S, S)
    return ((prompt | same) & before)[:, None]


def shared_logps(model: PreTrainedModel, batch: SharedBatch) -> tuple[Tensor, Tensor]:
    """log π(y_j | x, y_<j) of all tokens of all completions: (K, B, T) in nats, and the mask.

    The same numbers as `completion_logps` on K · B rows, at about half the work for a pair.

    Source: the factors of Eqs 8 and 9; `eq-chain-rule` in the book.
    """
    states = shared_states(model, batch)
    logp = target_logps(head_logits(model, states), batch.targets)
    return as_table(logp, batch.mask), batch.mask.long()


def shared_states(model: PreTrainedModel, batch: SharedBatch) -> Tensor:
    """The body's states (N, D) in which the batch's N completion tokens are chosen."""
    kind = batch.input_ids.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    # Added to the attention scores. In the scores' own dtype, or each layer would convert it again.
    hidden_from = ~visible(batch.branch)
    bias = torch.zeros(hidden_from.shape, dtype=dtype, device=hidden_from.device)
    bias.masked_fill_(hidden_from, torch.finfo(dtype).min)
    hidden = model.base_model(
        input_ids=batch.input_ids, attention_mask=bias, position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state  # (B, S, D)  # fmt: skip
    return hidden.flatten(0, 1)[batch.states]


def largest_difference(model: PreTrainedModel, rows: Sequence[PromptRow]) -> float:
    """The largest difference between the shared and the plain path, in nats a response."""
    n = len(rows[0][1])
    plain = collate([(x, ys[k]) for k in range(n) for x, ys in rows], model.device)
    with torch.no_grad():
        shared = shared_logps(model, collate_shared(rows, model.device))[0].sum(-1).flatten()
        return (shared - completion_logps(model, plain)[0].sum(-1)).abs().max().item()


def takes_shared_prompts(model: PreTrainedModel) -> tuple[bool, float]:
    """Whether the shared path gives this model's own numbers, by trial; and the difference.

    Three rows of random tokens: two short ones of unlike lengths, and one that is longer than any
    sliding window that the configuration names. A model that cannot read such a row, or that fails
    on a mask of this form, does not take it (the difference is then infinite).
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    random = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(config.vocab_size, (n,), generator=random).tolist()

    rows = [(ids(5), (ids(4), ids(7))), (ids(9), (ids(1), ids(3)))]
    rows.append((ids(window + 8), (ids(6), ids(6))))
    try:
        difference = largest_difference(model, rows)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False, float("inf")
    return difference <= TOLERANCE, difference
