"""Exercises of the chapter "Classical RLHF, exactly"."""

import torch
from torch import Tensor

from qlearn import losses
from qlearn.exact import soft, training
from qlearn.exact.tree import Levels, Tree
from qlearn.solutions import require_function, require_levels


def solution_1(tree: Tree, returns: Tensor, log_ref: Levels, beta: float) -> Levels:
    """β log π_ref on every token, and the answer's return on its last."""
    levels = zip(tree.only_at_end(returns), log_ref, strict=True)
    return tuple(r + beta * ref for r, ref in levels)


def check_1(answer) -> None:
    require_function(answer)
    for seed in range(3):
        tree, reward, log_ref, beta = _problem(seed)
        returns = tree.path_sums(reward)
        got = require_levels(answer(tree, returns, log_ref, beta), tree)
        last, ends = tree.only_at_end(returns), tree.only_at_end(torch.ones_like(returns))
        price = tuple(beta * ref for ref in log_ref)
        typical = [
            (last, "Where is the reference? Every token is paid β log π_ref."),
            (price, "Where is the return? It is paid on the last token of each answer."),
            (_sum(last, [e * p for e, p in zip(ends, price, strict=True)]),
             "The reference has its say on every token, not only on the last."),
            (_sum(last, [-p for p in price]),
             "The sign: β log π_ref is added. It is negative, so a rare token costs."),
            (_sum(last, log_ref),
             "log π_ref is in nats and the return in reward: β changes the money."),
        ]  # fmt: skip
        for wrong, hint in typical:
            assert _gap(got, wrong) > 1e-9, hint
        number = dict(zip(tree.leaves(), returns.tolist(), strict=True))
        for level, paid, ref in zip(tree.prefixes(), got, log_ref, strict=True):
            for s, row, opinion in zip(level, paid.tolist(), ref.tolist(), strict=True):
                for a, x in enumerate(row):
                    truth = beta * opinion[a] + number.get((*s, a), 0.0)
                    assert abs(x - truth) < 1e-9, (
                        f"Token {a} after {list(s[1:])} should be paid {truth:.4f}, not {x:.4f}."
                    )


def bug_2(tree: Tree, logp: Levels, reward: Levels, log_ref: Levels, beta: float) -> Levels:
    """∂J/∂logits of a tabular token policy."""
    _, q = soft.evaluate(tree, logp, reward)
    q = soft.kl_reward(logp, q, log_ref, beta)  # less the price of the token
    gradient = []
    for d, p, x in zip(soft.reach(tree, logp), logp, q, strict=True):
        value = (p.exp() * x).sum(dim=-1, keepdim=True)
        gradient.append(d[:, None] * p.exp() * (x - value))
    return tuple(gradient)


def solution_2(tree: Tree, logp: Levels, reward: Levels, log_ref: Levels, beta: float) -> Levels:
    """∂J/∂logits of a tabular token policy."""
    charged = soft.kl_reward(logp, reward, log_ref, beta)  # less the price of each token
    _, q = soft.evaluate(tree, logp, charged)
    gradient = []
    for d, p, x in zip(soft.reach(tree, logp), logp, q, strict=True):
        value = (p.exp() * x).sum(dim=-1, keepdim=True)
        gradient.append(d[:, None] * p.exp() * (x - value))
    return tuple(gradient)


def check_2(answer) -> None:
    require_function(answer)
    for seed in range(3):
        tree, reward, log_ref, beta = _problem(10 + seed)
        logp = _problem(40 + seed)[2]
        got = require_levels(answer(tree, logp, reward, log_ref, beta), tree)
        logits = torch.cat([x.flatten() for x in logp]).requires_grad_()
        policy = tuple(x.log_softmax(-1) for x in tree.split(logits))
        law = tree.path_sums(policy)
        price = beta * (law - tree.path_sums(log_ref))
        J = (law.exp() * (tree.path_sums(reward) - price)).sum()
        truth = tree.split(torch.autograd.grad(J, logits)[0])
        assert _gap(got, bug_2(tree, logp, reward, log_ref, beta)) > 1e-9, (
            "Each token pays its own price here, but not the prices of the tokens that follow it. "
            "J charges them all: which function should see the charged reward?"
        )
        free = training.policy_gradient(tree, logp, reward, logp, beta)
        assert _gap(got, free) > 1e-9, "Where is the price of distance?"
        reached = [d[:, None] * x for d, x in zip(soft.reach(tree, logp), got, strict=True)]
        assert _gap(reached, truth) > 1e-9, (
            "How often is a state reached? The gradient has d_π(s) in front."
        )
        front = [p.exp() * x for p, x in zip(logp, reached, strict=True)]
        assert _gap(front, truth) > 1e-9, (
            "That is A^π, the step of the natural gradient. The gradient has d_π π in front of it."
        )
        assert _gap(got, [-x for x in truth]) > 1e-9, "The sign: J is to be climbed."
        assert all(x.sum(dim=-1).abs().max() < 1e-9 for x in got), (
            "A row must sum to 0, for adding a constant to its logits changes nothing: subtract V."
        )
        assert _gap(got, truth) < 1e-9, (
            f"Autograd of J, answer by answer, differs by {_gap(got, truth):.3g}."
        )


def solution_3(ratio: float, advantage: float, clip: float) -> float:
    """−ρA, or 0 where the ratio left the interval in the direction that A asks for."""
    far = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
    return 0.0 if far else -ratio * advantage


def check_3(answer) -> None:
    require_function(answer)
    for clip in (0.1, 0.2):
        for ratio in (0.4, 0.85, 1.0, 1.15, 1.7):
            for advantage in (1.5, -0.7):
                logp = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
                loss = losses.ppo_clip(logp, torch.zeros(()), torch.tensor(advantage), clip)
                truth = torch.autograd.grad(loss, logp)[0].item()
                got = float(answer(ratio, advantage, clip))
                case = f"At ratio {ratio}, advantage {advantage}, clip {clip}"
                if truth:
                    assert abs(got) > 1e-9, (
                        f"{case} the clip is not silent: the ratio may be outside the interval, "
                        "but not in the direction that the advantage asks for."
                    )
                    assert abs(got + truth) > 1e-6, "The sign: the loss is minus the surrogate."
                    assert abs(got + advantage) > 1e-6 or ratio == 1, (
                        f"{case}: the derivative of ρ with respect to log π is ρ, not 1."
                    )
                else:
                    assert abs(got) < 1e-9, f"{case} the token went far enough: no slope is left."
                assert abs(got - truth) < 1e-6, f"{case} the slope of the loss is {truth:.4f}."


def solution_4(p, lr: float, beta: float) -> float:
    """max |1 − η β λ| over the eigenvalues λ of diag p − p pᵀ but the one that is 0."""
    p = torch.as_tensor(p, dtype=torch.float64)
    sizes = torch.linalg.eigvalsh(p.diag() - p[:, None] * p)[1:]
    return (1 - lr * beta * sizes).abs().max().item()


def check_4(answer) -> None:
    require_function(answer)
    for p, lr, beta in (
        ([0.5, 0.5], 1.0, 0.5),
        ([0.7, 0.2, 0.1], 2.0, 0.3),
        ([0.9, 0.06, 0.03, 0.01], 1.0, 1.0),
        ([0.4, 0.35, 0.25], 9.0, 0.5),
    ):
        best = torch.tensor(p, dtype=torch.float64).log()

        def step(theta, best=best, lr=lr, beta=beta):  # J = −β KL(π ‖ π*), up to a constant
            logp = theta.log_softmax(0)
            gain = -beta * (logp - best)
            return theta + lr * logp.exp() * (gain - (logp.exp() * gain).sum())

        slope = torch.autograd.functional.jacobian(step, best)
        centre = torch.eye(len(p), dtype=torch.float64) - 1 / len(p)
        factors = torch.linalg.eigvals(centre @ slope @ centre).abs().sort().values[1:]
        truth = factors[-1].item()
        got = float(answer(p, lr, beta))
        case = f"At p = {p}, learning rate {lr}, β = {beta}"
        assert abs(got - 1) > 1e-9, (
            "Factor 1 belongs to adding a constant to all logits, which moves no policy: leave it."
        )
        assert abs(got - abs(1 - lr * beta)) > 1e-9, (
            "That is the natural gradient's factor; the plain one is slowed by the probabilities."
        )
        assert abs(got - factors[0].item()) > 1e-9 or len(p) == 2, (
            f"{case} that part shrinks fastest. The stubborn one has the largest factor."
        )
        assert got >= 0, "A factor of size: take the absolute value, for a step can overshoot."
        assert abs(got - truth) < 1e-6, (
            f"{case} the factor is {truth:.5f}. Near the optimum the gradient is −β F δ: "
            "which eigenvalues does F = diag p − p pᵀ have?"
        )


def _sum(field, other) -> Levels:
    return tuple(x + y for x, y in zip(field, other, strict=True))


def _gap(field, other) -> float:
    """The largest difference of two fields on the tree."""
    return max((x - y).abs().max().item() for x, y in zip(field, other, strict=True))


def _problem(seed: int) -> tuple[Tree, Levels, Levels, float]:
    """A random reward and reference on a tree of two words and end, three tokens deep."""
    tree = Tree.full(n_actions=3, horizon=3, eos=0)
    generator = torch.Generator().manual_seed(500 + seed)
    reward, logits = (
        tree.split(torch.randn(21, generator=generator, dtype=torch.float64)) for _ in range(2)
    )
    return tree, reward, tuple(x.log_softmax(-1) for x in logits), (0.3, 0.7, 1.5)[seed % 3]
