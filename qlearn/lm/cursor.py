"""Texts being written, a row each, by one policy or by several mixed: one step at a time.

A `Cursor` holds log π of every row's next token and the key-value cache behind it. It is all that
a decoder needs to know of a language model: read `logp`, `keep` some rows, `append` their tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from qlearn.errors import InputError
from qlearn.lm.logprobs import Row, collate, completion_logits


class Mixture(NamedTuple):
    """A policy made of several: `combine` turns their log π, each (..., V), into its own.

    The models share one vocabulary; `qlearn.findings.proxy.tilted` makes one from three.
    """

    models: tuple[PreTrainedModel, ...]
    combine: Callable[..., Tensor]


Policy = PreTrainedModel | Mixture


class Cursor:
    """Rows of unfinished text: `logp` (N, V) in nats is log π of each row's next token.

    V is `n_tokens`, the tokenizer's size: rows of a table that no token names (Pythia has 27) have
    no probability. Equal prompts are read once.
    """

    only_falls = True  # a row's total cannot rise when it is continued

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], n_tokens: int):
        self.models, self.combine = parts(policy)
        self.n_tokens, self.device = n_tokens, self.models[0].device
        self.caches = [DynamicCache(config=model.config) for model in self.models]
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        # Padding stands on the left only here, so that every row's next token is the last column.
        longest = max(map(len, number))
        ids = torch.zeros(len(number), longest, dtype=torch.int64)
        self.mask = torch.zeros_like(ids)
        for prompt, i in number.items():
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            self.mask[i, longest - len(prompt) :] = 1
        self.mask = self.mask.to(self.device)
        self._check_recurrent()
        self._read(ids.to(self.device))
        self._check_cached()
        if len(number) < len(prompts):
            self.keep(torch.tensor([number[tuple(prompt)] for prompt in prompts]))

    def append(self, tokens: Tensor) -> None:
        """Each row goes on with its token (N,)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self._read(tokens[:, None].to(self.device))

    def keep(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was; rows may be dropped, repeated and reordered."""
        rows = rows.to(self.device)
        self.mask, self.logp = self.mask[rows], self.logp[rows]
        for cache in self.caches:
            cache.reorder_cache(rows)

    def _check_recurrent(self) -> None:
        # Prompts are padded on the left, and a recurrent state would have read the padding.
        for model in self.models:
            if getattr(model, "_is_stateful", False):
                raise InputError(
                    f"A model of the kind {model.config.model_type} is recurrent, and qlearn does "
                    "not write with those; scoring, as inspect and dpo do, works."
                )

    def _check_cached(self) -> None:
        for model, cache in zip(self.models, self.caches, strict=True):
            if cache.get_seq_length() != self.mask.shape[1]:
                raise InputError(
                    f"A model of the kind {model.config.model_type} keeps no key-value cache, and "
                    "qlearn does not write with those; scoring, as inspect and dpo do, works."
                )

    def _read(self, ids: Tensor) -> None:
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        found = []
        with torch.no_grad():
            for model, cache in zip(self.models, self.caches, strict=True):
                hidden = model.base_model(
                    input_ids=ids, attention_mask=self.mask, position_ids=positions,
                    past_key_values=cache, use_cache=True,
                ).last_hidden_state[:, -1]  # fmt: skip
                logits = model.get_output_embeddings()(hidden)[:, : self.n_tokens]
                found.append(logits.float().log_softmax(-1))
        self.logp = self.combine(*found)


def response_logps(
    policy: Policy, rows: Sequence[Row], n_tokens: int, batch_size: int = 128
) -> Tensor:
    """log π(y | x) of every row (prompt ids, response ids), over `n_tokens` tokens: (len(rows),).

    One pass over each whole row, so independent of a `Cursor`'s cache. Nats, on the CPU.
    """
    models, combine = parts(policy)
    sums = []
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch = collate(part, models[0].device)
            logits = (completion_logits(model, batch)[:, :n_tokens] for model in models)
            logp = combine(*(x.log_softmax(-1) for x in logits)).cpu()
            chosen = torch.tensor([token for _, response in part for token in response])
            per_token = logp.gather(1, chosen[:, None])[:, 0]
            sums += [x.sum() for x in per_token.split([len(response) for _, response in part])]
    return torch.stack(sums)


def parts(policy: Policy) -> tuple[tuple[PreTrainedModel, ...], Callable[..., Tensor]]:
    """The models of a policy, and how their log π become its own."""
    if isinstance(policy, Mixture):
        return policy.models, policy.combine
    return (policy,), lambda logp: logp
