"""Which token earns the credit: the soft advantage that a policy implies, token by token.

For a policy trained by DPO from its reference, β log π/π_ref estimates the soft advantage
Q̃* − V* of each token (Eq. 10), and its running sum the change of the soft value since the prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from qlearn.exact.check import check_beta, check_count
from qlearn.exact.soft import implicit_reward
from qlearn.lm.logprobs import Row, collate, completion_logits, completion_logps


class Credit(NamedTuple):
    """What a policy and its reference say about one response, a number a token: each (T,).

    logp and ref_logp in nats; advantage = β (logp − ref_logp), in units of reward; value is its
    running sum, the soft value after the token less that of the prompt; surprisal = −ref_logp.
    """

    logp: Tensor
    ref_logp: Tensor
    advantage: Tensor
    value: Tensor
    surprisal: Tensor


def token_credit(
    policy: PreTrainedModel, reference: PreTrainedModel, rows: Sequence[Row], beta: float,
    batch_size: int = 64,
) -> list[Credit]:  # fmt: skip
    """The credit of every token of each row (prompt ids, completion ids).

    Raises: ValueError for β that is not positive and finite, or a batch size below 1.
    Source: Eqs 10 and 11; `eq-implicit-reward` and `eq-surprisal` in the book.
    """
    check_beta(beta)
    check_count("batch_size", batch_size)
    credits = []
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], policy.device)
        with torch.no_grad():
            logp, ref_logp = (completion_logps(m, batch)[0].cpu() for m in (policy, reference))
        for length, p, ref in zip(batch.completion_lengths.tolist(), logp, ref_logp, strict=True):
            p, ref = p[:length], ref[:length]
            advantage = implicit_reward(p, ref, beta)
            credits.append(Credit(p, ref, advantage, advantage.cumsum(0), -ref))
    return credits


def one_step_map(
    reference: PreTrainedModel, rows: Sequence[Row], batch_size: int = 64
) -> list[Tensor]:
    """‖e_a − π_ref(·|s)‖² = 1 − 2 π_ref(a|s) + Σ_b π_ref(b|s)² of every token of each row: (T,).

    How far one small step of DPO from the reference moves log π(a|s), up to a factor a response:
    the heat map of a policy that has learned nothing yet. Large where a token surprises.

    Raises: ValueError for a batch size below 1.
    Source: D4; `eq-one-step-map` in the book.
    """
    check_count("batch_size", batch_size)
    maps = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = collate(part, reference.device)
        with torch.no_grad():
            p = completion_logits(reference, batch).softmax(-1)
        written = torch.cat([torch.tensor(completion) for _, completion in part]).to(p.device)
        distance = 1 - 2 * p.gather(1, written[:, None])[:, 0] + (p**2).sum(-1)
        maps += distance.cpu().split(batch.completion_lengths.tolist())
    return maps


def agreement(credits: Sequence[Credit], truths: Sequence[list[dict]]) -> dict[str, float]:
    """How well credit recovers a world's exact soft advantage (`World.explain`).

    spearman_facts over tokens that state a fact, pearson_all over all tokens. spearman_ceiling is
    what the exact advantage itself would score if each value were off by a normal error of 0.02:
    below 1 because many facts' true advantages differ by less than that.

    Raises: ValueError unless credits and truths are of the same tokens, at least two of them facts.
    """
    tokens = [token for truth in truths for token in truth]
    lengths = [len(credit.advantage) for credit in credits], [len(truth) for truth in truths]
    if lengths[0] != lengths[1]:
        raise ValueError("credits and truths must tell of the same tokens of the same responses.")
    if sum(token["kind"] in ("right", "slip", "habit") for token in tokens) < 2:
        raise ValueError("A correlation needs at least two tokens that state a fact.")
    found = torch.cat([credit.advantage for credit in credits]).numpy()
    exact = torch.tensor([token["advantage"] for token in tokens]).numpy()
    blurred = exact + 0.02 * np.random.default_rng(0).standard_normal(len(exact))
    facts = [token["kind"] in ("right", "slip", "habit") for token in tokens]
    return {
        "spearman_facts": float(spearmanr(found[facts], exact[facts]).statistic),
        "spearman_ceiling": float(spearmanr(blurred[facts], exact[facts]).statistic),
        "pearson_all": float(pearsonr(found, exact).statistic),
        "facts": sum(facts),
        "tokens": len(tokens),
    }
