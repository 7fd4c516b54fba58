"""Exercises of the chapter "DPO twice"."""

import torch
from torch import Tensor

from qlearn import losses
from qlearn.exact import soft
from qlearn.exact.tree import Levels, Tree
from qlearn.solutions import require_function, require_levels


def solution_1(margin: float, beta: float, winner: int, loser: int, n_actions: int) -> Tensor:
    """The gradient of the loss with respect to the logits of the state where two answers part."""
    g = beta / (1 + torch.tensor(margin, dtype=torch.float64).exp())  # β σ(−margin)
    gradient = torch.zeros(n_actions, dtype=torch.float64)
    gradient[winner] -= g
    gradient[loser] += g
    return gradient


def check_1(answer) -> None:
    require_function(answer)
    generator = torch.Generator().manual_seed(61)
    for beta, winner, loser in ((0.1, 0, 3), (0.5, 2, 1), (2.0, 3, 0)):
        logits = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()
        ref = torch.randn(4, generator=generator, dtype=torch.float64).log_softmax(-1)
        logp = logits.log_softmax(-1)
        out = losses.dpo(logp[winner], logp[loser], ref[winner], ref[loser], beta)
        (truth,) = torch.autograd.grad(out.loss, logits)
        margin = (out.chosen_reward - out.rejected_reward).item()
        got = answer(margin, beta, winner, loser, 4)
        assert isinstance(got, Tensor) and got.shape == truth.shape, "Return a vector, one a token."
        assert got.dtype == torch.float64, "The vector must be float64."
        assert got.sum().abs() < 1e-9, "What the winner's token gains the loser's token must lose."
        assert (got + truth).abs().max() > 1e-9, "The sign: a gradient points uphill on the loss."
        assert (got - truth).abs().max() < 1e-9, "How steep is −log σ(m) at this margin, times β?"


def bug_2(tree: Tree, reward: Levels, log_ref: Levels, beta: float) -> Levels:
    """The soft advantage of every token, which DPO's implicit reward should equal."""
    best = soft.soft_backup(tree, reward, log_ref, beta)
    return tuple(q - value[:, None] for q, value in zip(best.q, best.value, strict=True))


def solution_2(tree: Tree, reward: Levels, log_ref: Levels, beta: float) -> Levels:
    """The soft advantage of every token, which DPO's implicit reward equals at the optimum."""
    best = soft.soft_backup_prior(tree, reward, log_ref, beta)
    return tuple(q - value[:, None] for q, value in zip(best.q_tilde, best.value, strict=True))


def check_2(answer) -> None:
    require_function(answer)
    for seed in range(3):
        tree, reward, log_ref, beta = _problem(seed)
        logp = soft.soft_backup(tree, reward, log_ref, beta).logp
        got = require_levels(answer(tree, reward, log_ref, beta), tree)
        for t in range(tree.horizon):
            truth = soft.implicit_reward(logp[t], log_ref[t], beta)
            assert (got[t] - beta * logp[t]).abs().max() > 1e-9, (
                "That is β log π*: it blames a token for being rare under the reference too."
            )
            assert (got[t] - truth).abs().max() < 1e-9, "It should be β log π*/π_ref of each token."


def solution_3(logp: Levels, log_ref: Levels, beta: float) -> Levels:
    """A reward for which the policy with these log-probabilities is optimal."""
    return tuple(beta * (p - q) for p, q in zip(logp, log_ref, strict=True))


def check_3(answer) -> None:
    require_function(answer)
    for seed in range(3):
        tree, logits, log_ref, beta = _problem(10 + seed)
        logp = tuple(x.log_softmax(-1) for x in logits)
        reward = require_levels(answer(logp, log_ref, beta), tree)
        best = soft.soft_backup(tree, reward, log_ref, beta).logp
        for got, asked in zip(best, logp, strict=True):
            assert (got - asked).abs().max() < 1e-9, "Another policy is optimal for that reward."


def solution_4(tree: Tree, reward: Levels, log_ref: Levels, beta: float) -> float:
    """Implied minus true gap of returns: the winner answers prompt 0, the loser prompt 1."""
    value = soft.soft_backup(tree, reward, log_ref, beta).value[0]
    return (value[1] - value[0]).item()


def check_4(answer) -> None:
    require_function(answer)
    for seed in range(3):
        tree, reward, log_ref, beta = _problem(20 + seed, n_prompts=2)
        logp = soft.soft_backup(tree, reward, log_ref, beta).logp
        implied = soft.implicit_reward(tree.path_sums(logp), tree.path_sums(log_ref), beta)
        surplus = implied - tree.path_sums(reward)
        prompt = torch.tensor([y[0] for y in tree.leaves()])
        truth = (surplus[prompt == 0][0] - surplus[prompt == 1][0]).item()
        got = answer(tree, reward, log_ref, beta)
        assert isinstance(got, int | float | Tensor), "Return one number."
        assert abs(float(got) + truth) > 1e-9, "The sign: implied gap minus true gap."
        assert abs(float(got) - truth) < 1e-9, "What does each sum of log-ratios leave over?"


def _problem(seed: int, n_prompts: int = 1) -> tuple[Tree, Levels, Levels, float]:
    """A random reward and reference on a tree of two words and end, three tokens deep."""
    tree = Tree.full(n_actions=3, horizon=3, eos=0, n_prompts=n_prompts)
    generator = torch.Generator().manual_seed(seed)
    n = sum(table.numel() for table in tree.child)
    reward = tree.split(torch.randn(n, generator=generator, dtype=torch.float64))
    logits = tree.split(torch.randn(n, generator=generator, dtype=torch.float64))
    return tree, reward, tuple(x.log_softmax(-1) for x in logits), (0.3, 0.7, 1.0)[seed % 3]
