"""Where probability goes during preference training."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlearn.lm.logprobs import Row, collate, completion_logits


def log_ratio_and_kl(
    policy: PreTrainedModel, reference: PreTrainedModel, rows: Sequence[Row]
) -> tuple[Tensor, Tensor]:
    """Two estimates of the same number, for each row drawn from the reference: (len(rows),) twice.

    log π/π_ref of the response, and −Σ_t KL(π_ref(·|s_t) ‖ π(·|s_t)) over its states. Under the
    reference their means agree; the second varies less, because each token's choice is averaged
    exactly. Rows must hold complete samples of the reference, in nats.

    Source: Eq. 16; `eq-mean-log-ratio` in the book.
    """
    batch = collate(rows, policy.device)
    with torch.no_grad():
        logp, log_ref = (completion_logits(m, batch).log_softmax(-1) for m in (policy, reference))
    chosen = torch.cat([torch.tensor(completion) for _, completion in rows]).to(logp.device)
    token_ratio = (logp - log_ref).gather(1, chosen[:, None])[:, 0]
    token_kl = (log_ref.exp() * (log_ref - logp)).sum(-1)
    lengths = batch.completion_lengths.tolist()
    per_row = [torch.stack([x.sum() for x in y.split(lengths)]) for y in (token_ratio, -token_kl)]
    return per_row[0].cpu(), per_row[1].cpu()
