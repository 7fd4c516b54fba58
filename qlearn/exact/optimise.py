"""One optimiser for all exact fits: L-BFGS in float64, run until the gradient is gone."""

from collections.abc import Callable

import torch
from torch import Tensor

from qlearn.exact.check import check_count, check_tensors


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, max_iter: int = 5000) -> Tensor:
    """The argument at which a smooth scalar loss is least, from `start`, by L-BFGS.

    Raises: ValueError for a start that is not a row of floats, and where the loss is no
    number or stops being finite.
    """
    check_tensors(start=start)
    check_count("max_iter", max_iter)
    if start.ndim != 1 or start.isnan().any():
        raise ValueError("start must be one row of numbers.")
    if not len(start):
        return start.detach().clone()
    x = start.detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [x], max_iter=max_iter, line_search_fn="strong_wolfe", history_size=50,
        tolerance_grad=1e-12, tolerance_change=1e-18,
    )  # fmt: skip

    def closure():
        optimiser.zero_grad()
        value = loss(x)
        if value.numel() != 1:
            raise ValueError(f"The loss must be one number, not a tensor {tuple(value.shape)}.")
        if not value.isfinite():
            raise ValueError("The loss stops being finite; its minimum may lie at infinity.")
        value.backward()
        return value

    optimiser.step(closure)
    return x.detach()
