"""Exercises of the chapter "Beyond text"."""

import torch
from torch import Tensor

from qlearn.solutions import require_function


def solution_1(x: Tensor, mean: Tensor, ref_mean: Tensor, sigma: float) -> Tensor:
    """(‖x − μ_ref‖² − ‖x − μ‖²) / 2σ²."""
    return (((x - ref_mean) ** 2 - (x - mean) ** 2) / (2 * sigma**2)).sum(-1)


def check_1(answer) -> None:
    require_function(answer)
    x, mean, ref_mean = _randn(151, 3, 4, 5)
    for sigma in (0.3, 2.0):
        got = answer(x, mean, ref_mean, sigma)
        assert isinstance(got, Tensor), "Return a tensor."
        one, two = (torch.distributions.Normal(m, sigma).log_prob(x) for m in (mean, ref_mean))
        truth = (one - two).sum(-1)
        assert got.shape == (4,), "One number an image: log-densities of pixels add."
        _not(got, -truth, "The sign: a step is praised where the trained mean is the nearer one.")
        _not(
            got,
            truth / 5,
            "Sum over the pixels; a mean would divide the log-ratio by their number.",
        )
        _not(got, 2 * truth, "The exponent of a normal density has a factor ½.")
        _not(got, truth * sigma, "The square of σ stands in the exponent, not σ itself.")
        _not(got, truth * sigma**2, "Where is σ? Errors count in units of the step's own noise.")
        assert (got - truth).abs().max() < 1e-9, (
            "It should be the difference of two normal log-densities; equal variances cancel."
        )


def bug_2(
    log_ref_z: Tensor, log_ref_y: Tensor, returns: Tensor, beta: float, gamma: float
) -> Tensor:
    """log π*(z|x) of each order."""
    painter = (log_ref_y + returns / gamma).log_softmax(-1)
    worth = (painter.exp() * returns).sum(-1)
    return (log_ref_z + worth / beta).log_softmax(-1)


def solution_2(
    log_ref_z: Tensor, log_ref_y: Tensor, returns: Tensor, beta: float, gamma: float
) -> Tensor:
    """log π*(z|x) of each order."""
    painter = (log_ref_y + returns / gamma).log_softmax(-1)
    worth = (painter.exp() * (returns - gamma * (painter - log_ref_y))).sum(-1)
    return (log_ref_z + worth / beta).log_softmax(-1)


def check_2(answer) -> None:
    require_function(answer)
    for log_ref_z, log_ref_y, returns, beta, gamma in _studios():
        got = answer(log_ref_z, log_ref_y, returns, beta, gamma)
        assert isinstance(got, Tensor) and got.shape == (3,), "Return one number an order."
        assert abs(got.exp().sum() - 1) < 1e-9, "The probabilities of all orders must sum to 1."

        def orders(worth, price=beta, log_ref_z=log_ref_z):
            return (log_ref_z + worth / price).log_softmax(-1)

        painter = (log_ref_y + returns / gamma).log_softmax(-1)
        value = gamma * (log_ref_y + returns / gamma).logsumexp(-1)
        _not(
            got,
            orders((painter.exp() * returns).sum(-1)),
            "The painter's change looks free. What does he pay for it, and at which price?",
        )
        _not(
            got,
            orders((log_ref_y.exp() * returns).sum(-1)),
            "That is the best writer for the frozen painter; this one is trained as well.",
        )
        _not(got, orders(value, gamma), "The writer's nats cost β, not γ.")
        unpriced = (painter.exp() * (returns - painter + log_ref_y)).sum(-1)
        _not(got, orders(unpriced), "His nats cost γ each.")
        unpriced = (painter.exp() * (returns - beta * (painter - log_ref_y))).sum(-1)
        _not(got, orders(unpriced), "The painter's nats cost γ, not β.")
        _not(got, (value / beta).log_softmax(-1), "Where is the writer's reference?")
        _not(got, orders(value / gamma), "V*(z) is γ times a logarithm.")
        for tilt in (returns, returns / beta):
            astray = log_ref_y + tilt
            worth = gamma * astray.logsumexp(-1)
            _not(got, orders(worth), "The painter tilts by R/γ.")
            astray = astray.log_softmax(-1)
            worth = (astray.exp() * (returns - gamma * (astray - log_ref_y))).sum(-1)
            _not(got, orders(worth), "The painter tilts by R/γ.")
        assert (got - orders(value)).abs().max() < 1e-9, (
            "The worth of an order is what the painter earns less what his change costs: V*(z)."
        )


def solution_3(
    order: int,
    picture: int,
    log_ref_z: Tensor,
    log_ref_y: Tensor,
    returns: Tensor,
    beta: float,
    gamma: float,
) -> tuple[float, float]:
    """V*(z) − V*(x) and R(y) − V*(z)."""
    after = gamma * (log_ref_y + returns / gamma).logsumexp(-1)
    before = beta * (log_ref_z + after / beta).logsumexp(-1)
    return (after[order] - before).item(), (returns[picture] - after[order]).item()


def check_3(answer) -> None:
    require_function(answer)
    for log_ref_z, log_ref_y, returns, beta, gamma in _studios():
        value = gamma * (log_ref_y + returns / gamma).logsumexp(-1)
        root = beta * (log_ref_z + value / beta).logsumexp(-1)
        best_z = (log_ref_z + value / beta).log_softmax(-1)
        best_y = (log_ref_y + returns / gamma).log_softmax(-1)
        for order, picture in ((0, 3), (2, 1)):
            got = answer(order, picture, log_ref_z, log_ref_y, returns, beta, gamma)
            assert isinstance(got, tuple | list) and len(got) == 2, (
                "Return a pair: the writer's term, the painter's term."
            )
            writer, painter = (float(x) for x in got)
            one = beta * (best_z - log_ref_z)[order].item()
            two = gamma * (best_y - log_ref_y)[order, picture].item()
            assert max(abs(writer - two), abs(painter - one)) > 1e-9, (
                "The writer's term comes first."
            )
            nats = one / beta, two / gamma
            assert max(abs(writer - nats[0]), abs(painter - nats[1])) > 1e-9, (
                "These are nats; each must be paid at its own price."
            )
            mean = (log_ref_y.exp() * returns).sum(-1)[order].item()
            assert abs(painter - (returns[picture].item() - mean)) > 1e-9, (
                "You measure the painter against his old average; the forecast is the soft value."
            )
            assert abs(writer + painter - (returns[picture] - root).item()) < 1e-9, (
                "The two terms must share out R(y) − V*(x): is each value taken at its own price?"
            )
            assert abs(writer - one) < 1e-9, (
                "The sum is right, the shares are not: the writer's is V*(z) − V*(x)."
            )


def solution_4(steps: list[Tensor], returns: Tensor, beta: float) -> Tensor:
    """V*(noise j) − V*(noise i)."""
    value = returns
    for log_ref in reversed(steps):
        value = beta * (log_ref + value / beta).logsumexp(-1)
    return value[None, :] - value[:, None]


def check_4(answer) -> None:
    require_function(answer)
    for seed, beta in ((0, 0.4), (1, 1.5)):
        steps = [2 * x for x in _randn(154 + seed, 3, 4, 4)]
        steps = [x.log_softmax(-1) for x in steps]
        (returns,) = _randn(164 + seed, 1, 4)
        got = answer(steps, returns, beta)
        assert isinstance(got, Tensor) and got.shape == (4, 4), (
            "Return a matrix: a row for the winner's noise, a column for the loser's."
        )
        # The value of a noise without a recursion: the law of the final value, then one mean.
        end = torch.linalg.multi_dot([x.exp() for x in steps])
        value = beta * (end @ (returns / beta).exp()).log()
        truth = value[None, :] - value[:, None]
        _not(
            got,
            -truth,
            "The sign: the value of the winner's own noise is subtracted from its return.",
        )
        mean = end @ returns
        _not(got, mean[None, :] - mean[:, None], "A mean of returns; V* is a soft value.")
        wrong = torch.linalg.multi_dot([x.exp() for x in steps[::-1]])
        value = beta * (wrong @ (returns / beta).exp()).log()
        _not(
            got,
            value[None, :] - value[:, None],
            "Work back from the end: the last step of the list comes first.",
        )
        assert (got - truth).abs().max() < 1e-9, (
            "Compute V* of each noise by backing up through all steps, then take differences."
        )


def solution_5(log_ref_z: Tensor, log_ref_y: Tensor, logp_z: Tensor, logp_y: Tensor) -> Tensor:
    """KL( π_ref(z|y) ‖ π(z|y) ) of each picture."""
    ref_ways = (log_ref_z[:, None] + log_ref_y).log_softmax(0)
    ways = (logp_z[:, None] + logp_y).log_softmax(0)
    return (ref_ways.exp() * (ref_ways - ways)).sum(0)


def check_5(answer) -> None:
    require_function(answer)
    for seed in range(3):
        z, other_z = (x.log_softmax(-1) for x in _randn(175 + seed, 2, 3))
        y, other_y = (x.log_softmax(-1) for x in _randn(185 + seed, 2, 3, 4))
        got = answer(z, y, other_z, other_y)
        assert isinstance(got, Tensor) and got.shape == (4,), "Return one number a picture."
        base, mine = z.exp() @ y.exp(), other_z.exp() @ other_y.exp()
        ratio = other_z[:, None] + other_y - z[:, None] - y
        of_ref = (z.exp()[:, None] * y.exp() / base * ratio).sum(0)
        of_policy = (other_z.exp()[:, None] * other_y.exp() / mine * ratio).sum(0)
        image = (mine / base).log()
        _not(got, of_ref - image, "The sign: the log-ratio of the picture comes first.")
        _not(got, image - of_policy, "Average over the reference's ways, not the policy's.")
        _not(
            got,
            image - (z.exp()[:, None] * ratio).sum(0),
            "Weigh an order by how often the reference used it for *this* picture: π_ref(z|y).",
        )
        _not(got, image, "That is the first term alone; subtract the mean over the paths.")
        _not(got, of_ref, "That is the second term alone.")
        assert (got - (image - of_ref)).abs().max() < 1e-9, (
            "π(y) sums over orders; the mean is over π_ref(z|y) ∝ π_ref(z) π_ref(y|z)."
        )


def _not(got: Tensor, wrong: Tensor, hint: str) -> None:
    """AssertionError with the hint where the answer is this typical wrong one."""
    assert (got - wrong).abs().max() > 1e-9, hint


def _randn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _studios():
    """Three orders, four pictures, random habits and returns, at several pairs of prices."""
    for seed, (beta, gamma) in enumerate(((0.5, 1.5), (2.0, 0.3), (0.7, 0.4))):
        (z,) = _randn(120 + seed, 1, 3)
        y = _randn(130 + seed, 3, 4)
        (returns,) = _randn(140 + seed, 1, 4)
        yield z.log_softmax(-1), y.log_softmax(-1), 2 * returns, beta, gamma
