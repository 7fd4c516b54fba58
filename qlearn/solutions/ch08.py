"""Exercises of the chapter "The breakage lab"."""

import math

import torch
from torch import Tensor

from qlearn.exact import soft
from qlearn.exact.tree import Levels, Tree
from qlearn.solutions import require_function


def solution_1(earned, ahead) -> float:
    """σ(earned + ahead) less σ(earned), each of the first answer less the second."""
    judge = earned[0] - earned[1]
    policy = judge + ahead[0] - ahead[1]
    return 1 / (1 + math.exp(-policy)) - 1 / (1 + math.exp(-judge))


def check_1(answer) -> None:
    require_function(answer)
    for earned, ahead in (
        ([1.0, -1.5], [-0.2, 0.4]),
        ([0.0, 0.0], [2.0, -1.0]),
        ([0.3, 0.5], [0.7, 0.7]),
    ):
        got = answer(earned, ahead)
        assert isinstance(got, int | float | Tensor), "Return one number."
        margins = [earned[0] - earned[1] + sign * (ahead[0] - ahead[1]) for sign in (0, 1, -1)]
        judge, policy, less = torch.tensor(margins, dtype=torch.float64).sigmoid().tolist()
        truth, got = policy - judge, float(got)
        if abs(truth) > 1e-6:
            assert abs(got + truth) > 1e-6, "The sign: the policy's probability less the judge's."
            assert abs(got - policy) > 1e-6, "That is the policy's probability; the judge has one."
            assert abs(got - (less - judge)) > 1e-6, (
                "The value of the open state is added: the policy counts on what can still come."
            )
        assert abs(got - truth) < 1e-6, (
            f"For earned = {earned} and ahead = {ahead} the policy says {policy:.3f} and the judge "
            f"{judge:.3f}: which margin does each of them see?"
        )


def bug_2(tree: Tree, logp: Levels, log_ref: Levels, beta: float, gamma: float) -> Tensor:
    """The discounted implicit return of every answer, in the order of `tree.leaves()`."""
    weighted = []
    for t, (p, q) in enumerate(zip(logp, log_ref, strict=True), start=1):
        weighted.append(gamma**t * beta * (p - q))
    return tree.path_sums(tuple(weighted))


def solution_2(tree: Tree, logp: Levels, log_ref: Levels, beta: float, gamma: float) -> Tensor:
    """The discounted implicit return of every answer, in the order of `tree.leaves()`."""
    weighted = []
    for t, (p, q) in enumerate(zip(logp, log_ref, strict=True), start=1):
        weighted.append(gamma ** (t - 1) * beta * (p - q))  # the first token counts in full
    return tree.path_sums(tuple(weighted))


def check_2(answer) -> None:
    require_function(answer)
    for seed in range(3):
        tree, reward, log_ref, beta = _problem(seed)
        gamma = (0.5, 0.8, 0.95)[seed]
        best = soft.soft_backup(tree, reward, log_ref, beta, gamma)
        got = answer(tree, best.logp, log_ref, beta, gamma)
        leaves = tree.leaves()
        assert isinstance(got, Tensor) and got.shape == (len(leaves),), "One number an answer."
        row = {s: (t, i) for t, level in enumerate(tree.prefixes()) for i, s in enumerate(level)}
        paid = []
        for y in leaves:
            visited = ((row[y[: n + 1]], y[n + 1]) for n in range(len(y) - 1))
            paid.append(sum(gamma**t * reward[t][i, a].item() for (t, i), a in visited))
        truth = torch.tensor(paid, dtype=torch.float64) - best.value[0]
        plain = tree.path_sums(soft.implicit_rewards(best.logp, log_ref, beta))
        assert (got + truth).abs().max() > 1e-6, "Policy and reference have changed places."
        if beta != 1:
            assert (beta * got - truth).abs().max() > 1e-6, "β is missing: a nat has a price."
        assert (got - plain).abs().max() > 1e-6, "No token is weighted: later ones count less."
        assert (got - gamma * truth).abs().max() > 1e-6, (
            "Every margin is γ times too small. Which weight should the first token have?"
        )
        assert (got - truth).abs().max() < 1e-6, (
            "For the best policy it should be Σ γ^(t−1) r − V*(x), and it is not."
        )


def solution_3(returns: Tensor, log_first: Tensor, log_second: Tensor, price) -> float:
    """The soft value of the texts at their price, of the images at theirs."""
    value = price[1] * (log_second + returns / price[1]).logsumexp(dim=1)
    return (price[0] * (log_first + value / price[0]).logsumexp(dim=0)).item()


def check_3(answer) -> None:
    require_function(answer)
    generator = torch.Generator().manual_seed(83)
    for price in ((2.0, 0.3), (0.2, 1.5), (0.7, 0.7)):
        returns = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        first = torch.randn(3, generator=generator, dtype=torch.float64).log_softmax(0)
        second = torch.randn(3, 4, generator=generator, dtype=torch.float64).log_softmax(1)
        got = answer(returns, first, second, price)
        assert isinstance(got, int | float | Tensor), "Return one number."
        truth = _two_stages(returns, first, second, *price)
        value = price[1] * (second.exp() * (returns / price[1]).exp()).sum(dim=1).log()
        assert abs(float(got) - (first.exp() @ value).item()) > 1e-6, (
            "That averages the texts; the refiner chooses among them, at its own price."
        )
        if price[0] != price[1]:
            for b in price:
                alone = _two_stages(returns, first, second, b, b)
                assert abs(float(got) - alone) > 1e-6, f"That charges {b} in both stages."
            swapped = _two_stages(returns, first, second, price[1], price[0])
            assert abs(float(got) - swapped) > 1e-6, "The two prices have changed places."
        assert abs(float(got) - truth) < 1e-6, (
            f"At prices {price} the value is {truth:.4f}. What is a text worth before it is chosen?"
        )


def solution_4(tree: Tree, logp: Levels, reward: Levels, log_ref: Levels, beta: float) -> float:
    """γ, as the slope of β log π/π_ref − r, less that of end, in the value that follows."""
    t = tree.horizon - 2
    deepest = soft.soft_value_prior(reward[-1], log_ref[-1], beta)  # knows no discount
    after = tree.next_value(t, deepest)  # V(s'), 0 after end
    left = beta * (logp[t] - log_ref[t]) - reward[t]  # γ V(s') − V(s)
    left = left - left[:, :1]  # end is token 0
    return ((left * after).sum() / (after * after).sum()).item()


def check_4(answer) -> None:
    require_function(answer)
    for seed, gamma in enumerate((0.5, 0.9, 0.99, 1.0)):
        tree, reward, log_ref, beta = _problem(20 + seed)
        logp = soft.soft_backup(tree, reward, log_ref, beta, gamma).logp
        got = answer(tree, logp, reward, log_ref, beta)
        assert isinstance(got, int | float | Tensor), "Return one number."
        assert abs(float(got) - gamma) < 1e-6, (
            f"The policy was trained with γ = {gamma}, not {float(got):.6g}. Which values can you "
            "compute without knowing γ? And which token is followed by none?"
        )


def _two_stages(returns, first, second, b1, b2) -> float:
    """V*(x) by sums of exponentials."""
    value = b2 * (second.exp() * (returns / b2).exp()).sum(dim=1).log()
    return (b1 * (first.exp() * (value / b1).exp()).sum().log()).item()


def _problem(seed: int) -> tuple[Tree, Levels, Levels, float]:
    """A random reward and reference on a tree of two words and end, three tokens deep."""
    tree = Tree.full(n_actions=3, horizon=3, eos=0)
    generator = torch.Generator().manual_seed(800 + seed)
    reward, logits = (
        tree.split(torch.randn(21, generator=generator, dtype=torch.float64)) for _ in range(2)
    )
    return tree, reward, tuple(x.log_softmax(-1) for x in logits), (0.3, 0.7, 1.0)[seed % 3]
