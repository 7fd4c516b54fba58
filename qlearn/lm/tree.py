"""A language model as an exact tree: its most likely tokens for a few steps, renormalised.

On such a tree every identity of the exact floor holds to rounding for a real network's logits,
whatever it was trained on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlearn.errors import InputError
from qlearn.exact.tree import TERMINAL, Levels, Tree


class LanguageTree(NamedTuple):
    """The tree below one prompt; fields are float64 edge fields (n_t, k).

    logits are the policy's own, logp and log_ref the renormalised log-probabilities, and token[t]
    the token id of each edge.
    """

    tree: Tree
    token: Levels
    logits: Levels
    logp: Levels
    log_ref: Levels


def language_tree(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    prompt: Sequence[int],
    *,
    top_k: int,
    horizon: int,
    eos: int,
) -> LanguageTree:
    """The tree of the reference's `top_k` tokens in each state, `horizon` tokens deep.

    Writing `eos` or reaching the horizon ends a response.

    Raises: InputError where top_k exceeds the vocabulary or horizon is not positive.
    """
    vocabulary = reference.get_output_embeddings().weight.shape[0]
    if not 1 <= top_k <= vocabulary or horizon < 1:
        raise InputError(f"top_k must lie in 1..{vocabulary} and horizon be at least 1.")
    states = torch.tensor([list(prompt)])
    child, tokens, logits, logps, log_refs = [], [], [], [], []
    for t in range(horizon):
        ref, own = (_next_logits(m, states) for m in (reference, policy))
        token = ref.topk(top_k, dim=-1).indices
        ref, own = ref.gather(1, token), own.gather(1, token)
        goes_on = (token != eos) & (t + 1 < horizon)
        table = torch.full(token.shape, TERMINAL)
        table[goes_on] = torch.arange(int(goes_on.sum()))
        for found, x in zip(
            (child, tokens, logits, logps, log_refs),
            (table, token, own, own.log_softmax(-1), ref.log_softmax(-1)),
            strict=True,
        ):
            found.append(x)
        parent, edge = goes_on.nonzero(as_tuple=True)
        states = torch.cat([states[parent], token[parent, edge][:, None]], dim=1)
        if not len(states):
            break
    tree = Tree(tuple(child))
    return LanguageTree(tree, tuple(tokens), tuple(logits), tuple(logps), tuple(log_refs))


def _next_logits(model: PreTrainedModel, states: Tensor, batch_size: int = 512) -> Tensor:
    parts = []
    with torch.no_grad():
        for rows in states.to(model.device).split(batch_size):
            hidden = model.base_model(input_ids=rows, use_cache=False).last_hidden_state[:, -1]
            parts.append(model.get_output_embeddings()(hidden).double().cpu())
    return torch.cat(parts)
