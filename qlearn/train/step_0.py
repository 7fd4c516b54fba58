"""Before the first update π = π_ref and π = π_old: how far rounding may move either from that."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

# How far a batch of log-probabilities moves where one model reads it twice, in tables of other
# shapes, as a share of Σ |log π|. benchmarks/measured/step0.json: at most 4e-8 in float32 and 1e-6
# in bfloat16; with dropout 0.1 at least 1.5e-3, for a reference one update old (learning rate 1e-5)
# at least 3e-4. Responses of one to three tokens move further: 1e-5 together, in bfloat16.
SHARE = {torch.float32: 2.0**-15, torch.bfloat16: 2.0**-13}
# Nats a token by which the float32 log-softmax alone may move, at logits up to 128.
FLOOR = 2.0**-16


def explained_by_rounding(logps: Tensor, n_tokens: int, dtype: torch.dtype) -> float:
    """How large Σ |log π − log π'| of a batch may be under equal weights, in nats.

    logps: log π of whole responses. dtype: what the body computes in.
    """
    return logps.abs().sum().item() * SHARE[dtype] + n_tokens * FLOOR


def same_weights(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    """Whether two models have exactly the same parameters."""
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
