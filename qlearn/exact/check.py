"""The doors of the exact floor: input that fits no formula ends in one ValueError of one sentence.

Formulae stay formulae: a public function calls one of these first and then computes. What has a
limit is computed (a prompt with one answer has preference loss 0); what has none is refused.
"""

import math
from numbers import Integral, Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # trees check their own fields with this module
    from qlearn.exact.soft import MDP, Beta
    from qlearn.exact.tree import Levels


def check_problem(
    tree: "MDP", reward: "Levels", log_ref: "Levels", beta: "Beta", gamma: float = 1.0,
    name: str = "reward",
) -> None:  # fmt: skip
    """Raises ValueError unless the fields fit the tree and β and γ are usable."""
    check_beta(beta, tree.shapes)
    check_number("gamma", gamma, above=0, most=1)
    check_reward(tree, reward, name)
    check_policy(tree, log_ref, "log_ref", everywhere=True)


def check_reward(tree: "MDP", reward: "Levels", name: str = "reward") -> None:
    """Raises ValueError unless `reward` is an edge field, finite where the tree has an action."""
    check_fields(tree.shapes, **{name: reward})
    for t, r in enumerate(reward):
        absent = tree.absent(t)
        present = r if absent is None else r.masked_fill(absent, 0.0)
        # A finite sum has finite terms, and costs a fifth of testing each.
        if not (present.sum().isfinite() or present.isfinite().all()):
            s, a = _first(~present.isfinite())
            raise ValueError(
                f"{name} of action {a} in state {s} of level {t} is {r[s, a]}, not a finite number."
            )


def check_policy(
    tree: "MDP", logp: "Levels", name: str = "logp", *, everywhere: bool = False
) -> None:
    """Raises ValueError unless `logp` holds log-probabilities that sum to 1 in each state.

    −inf where an action is ABSENT, and with `everywhere` nowhere else.
    """
    check_fields(tree.shapes, **{name: logp})
    for t, p in enumerate(logp):
        absent = tree.absent(t)
        present = p if absent is None else p.masked_fill(absent, 0.0)
        if everywhere and not present.sum().isfinite():
            s, a = _first(~present.isfinite())
            who = "reference" if name == "log_ref" else "policy"
            raise ValueError(
                f"{name} of action {a} in state {s} of level {t} is {p[s, a]}: the {who} "
                "never writes it, so its reward cannot be known; mark the action ABSENT instead."
            )
        if absent is not None and not p.masked_fill(absent, -math.inf).equal(p):
            s, a = _first(absent & (p != -math.inf))
            raise ValueError(
                f"{name} must be -inf for action {a} in state {s} of level {t}, which is ABSENT."
            )
        off = p.exp().sum(dim=-1) - 1
        if not off.abs().max() <= 1e-8:
            s = int(off.abs().argmax())
            raise ValueError(
                f"{name} is not a distribution: in state {s} of level {t} the probabilities sum "
                f"to 1 {'-' if off[s] < 0 else '+'} {abs(off[s].item()):.3g}."
            )


def check_states(tree: "MDP", **fields: "Levels") -> None:
    """Raises ValueError unless each field has one number a state, in float64."""
    check_fields([(n,) for n, _ in tree.shapes], **fields)


def check_alike(**fields: "Levels") -> None:
    """Raises ValueError unless these edge fields have the shapes of the first, in float64."""
    name, first = next(iter(fields.items()))
    if not isinstance(first, tuple | list):
        raise ValueError(f"{name} must be a tuple with one tensor a level.")
    check_fields([tuple(getattr(x, "shape", ())) for x in first], **fields)


def check_fields(
    shapes: list[tuple[int, ...]], dtype: torch.dtype | None = torch.float64, **fields: "Levels"
) -> None:
    """Raises ValueError unless each field holds one tensor a level, of these shapes and `dtype`."""
    for name, field in fields.items():
        if not (isinstance(field, tuple | list) and all(isinstance(x, Tensor) for x in field)):
            raise ValueError(f"{name} must be a tuple with one tensor a level.")
        found = [tuple(x.shape) for x in field]
        if found != shapes:
            of_states = bool(shapes) and len(shapes[0]) == 1
            kind = (
                "row a level with one number a state"
                if of_states
                else "(states, actions) table a level"
            )
            raise ValueError(f"{name} must have one {kind}, {shapes}; got {found}.")
        if dtype is not None and any(x.dtype != dtype for x in field):
            why = ": the exact floor promises 1e-10" if dtype == torch.float64 else ""
            raise ValueError(f"{name} must be {str(dtype).removeprefix('torch.')}{why}.")


def check_below(tree: "MDP", t: int, value: Tensor) -> None:
    """Raises ValueError unless `value` has one number a state of level t + 1."""
    shapes = [(n,) for n, _ in tree.shapes[t + 1 : t + 2]] or [(0,)]
    if [tuple(value.shape)] != shapes:
        raise ValueError(
            f"The values below level {t} must have shape {shapes[0]}, not {tuple(value.shape)}."
        )


def check_mass(tree: "MDP", t: int, mass: Tensor) -> None:
    """Raises ValueError unless `mass` has one number an edge of level t."""
    if tuple(mass.shape) != tree.shapes[t]:
        raise ValueError(
            f"The mass on level {t} must have shape {tree.shapes[t]}, not {tuple(mass.shape)}."
        )


def check_beta(beta: "Beta | Tensor", shapes: list[tuple[int, ...]] | None = None) -> None:
    """Raises ValueError unless β is a positive, finite number, a tensor of them, or one a state."""
    if isinstance(beta, tuple) and shapes is not None:
        if [tuple(b.shape) for b in beta] != [(n,) for n, *_ in shapes]:
            raise ValueError("beta must be a number, or a state field with one (n_t,) row a level.")
        for t, b in enumerate(beta):
            bad = ~(b.isfinite() & (b > 0))
            if bad.any():
                s = _first(bad)[0]
                raise ValueError(
                    f"beta must be positive and finite; in state {s} of level {t} it is {b[s]:g}."
                )
    elif isinstance(beta, Tensor):
        if not (beta.isfinite() & (beta > 0)).all():
            raise ValueError("beta must be positive and finite in every place of its tensor.")
    else:
        positive = isinstance(beta, Real) and math.isfinite(beta) and beta > 0
        if not positive:
            raise ValueError(f"beta must be a positive, finite number, not {beta!r}.")


def check_number(
    name: str, x: float, *, above: float = -math.inf, least: float = -math.inf,
    below: float = math.inf, most: float = math.inf,
) -> None:  # fmt: skip
    """Raises ValueError unless x is a finite number with above < x < below, least ≤ x ≤ most."""
    number = isinstance(x, Real) and math.isfinite(x)
    if not (number and above < x < below and least <= x <= most):
        low = f"[{least:g}" if least > -math.inf else f"({above:g}"
        high = f"{most:g}]" if most < math.inf else f"{below:g})"
        raise ValueError(f"{name} must lie in {low}, {high}, not {x!r}.")


def check_count(name: str, n: int, least: int = 1) -> None:
    """Raises ValueError unless n is a whole number that is not less than `least`."""
    if not (isinstance(n, Integral) and n >= least):
        raise ValueError(f"{name} must be a whole number, at least {least}, not {n!r}.")


def check_tensors(
    mask: Tensor | None = None, *, broadcast: bool = False, **tensors: Tensor
) -> None:
    """Raises ValueError unless the tensors are of floats and of one shape, which `mask` shares.

    A (B,) beside a (B, 1) would broadcast to (B, B) and be averaged without a word. With
    `broadcast` a (B, 1) beside a (1, B) may do so: a table of all pairs has its axes named.
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor of floats, not {kind}.")
    everything = tensors if mask is None else {**tensors, "mask": mask}
    if not all(isinstance(x, Tensor) for x in everything.values()):
        raise ValueError(f"mask must be a tensor, not {type(mask).__name__}.")
    shapes = [tuple(x.shape) for x in everything.values()]
    axes = [set(sizes) - {1} for sizes in zip(*shapes, strict=False)]
    fits = len({len(s) for s in shapes}) == 1 and all(len(sizes) < 2 for sizes in axes)
    if len(set(shapes)) > 1 and not (broadcast and fits):
        raise ValueError(f"{' and '.join(everything)} must have one shape; got {shapes}.")


def _first(where: Tensor) -> list[int]:
    return where.nonzero()[0].tolist()
