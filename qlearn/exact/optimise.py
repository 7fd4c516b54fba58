"""One optimiser for all exact fits: L-BFGS in float64, run until the gradient is gone."""

from collections.abc import Callable

import torch
from torch import Tensor


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, max_iter: int = 5000) -> Tensor:
    """The argument at which a smooth scalar loss is least, from `start`, by L-BFGS.

    Raises: ValueError where the loss stops being finite.
    """
    x = start.detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [x], max_iter=max_iter, line_search_fn="strong_wolfe", history_size=50,
        tolerance_grad=1e-12, tolerance_change=1e-18,
    )  # fmt: skip

    def closure():
        optimiser.zero_grad()
        value = loss(x)
        if not value.isfinite():
            raise ValueError("The loss stops being finite; its minimum may lie at infinity.")
        value.backward()
        return value

    optimiser.step(closure)
    return x.detach()
