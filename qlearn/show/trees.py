"""The course's running picture: a tree of tokens, always drawn and coloured the same way.

Time runs to the right. An edge is a token: its colour is a number (blue helps, orange hurts), its
width a probability. A disc is a state, its value inside; a small square is a finished response.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from torch import Tensor

from qlearn.exact.tree import Levels, Tree

PRAISE, BLAME, NEUTRAL = "#1f6fd6", "#dd7214", "#9a9a9a"
PAPER, INK = "#fbfaf7", "#222222"  # a figure brings its own paper, so it reads in dark mode too
SCALE = LinearSegmentedColormap.from_list("credit", [BLAME, "#c9c4bc", PRAISE])


def draw_tree(
    tree: Tree,
    tokens: Sequence[str],
    *,
    colour: Levels | None = None,
    width: Levels | None = None,
    number: Levels | None = None,
    value: Levels | None = None,
    leaf: Tensor | None = None,
    path: Sequence[int] | None = None,
    scale: float | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draws the tree below the first prompt; returns the axes. Fields are edge fields (n_t, A).

    tokens  (A,) names      colour  number → blue or orange, `scale` at full colour
    width   probability     number  printed at the edge     value  state field printed in the disc
    leaf    (L,) printed at the responses, in the order of `tree.leaves()`
    path    tokens of one response to draw bold; the rest fades
    """
    ax = ax or plt.subplots(figsize=(8, 4.2), layout="constrained")[1]
    ax.figure.set_facecolor(PAPER)
    places, leaves = _places(tree)
    top = scale or max((x.abs().max().item() for x in colour or ()), default=1.0) or 1.0
    paint = Normalize(-top, top)
    for t, prefixes in enumerate(tree.prefixes()):
        for s, prefix in enumerate(prefixes):
            if prefix[0] != 0:
                continue
            for a in range(tree.child[t].shape[1]):
                end = (*prefix, a)
                if end not in places:
                    continue  # this state does not have the action
                on_path = path is None or tuple(path[: t + 1]) == end[1:]
                _edge(
                    ax, places[prefix], places[end], tokens[a],
                    SCALE(paint(colour[t][s, a].item())) if colour else NEUTRAL,
                    0.8 + 6 * width[t][s, a].item() if width else 2.0,
                    None if number is None else number[t][s, a].item(),
                    1.0 if on_path else 0.25,
                )  # fmt: skip
            _disc(ax, places[prefix], None if value is None else value[t][s].item())
    for i, response in enumerate(leaves):
        x, y = places[response]
        ax.plot(x, y, "s", color=INK, markersize=4, zorder=3)
        if leaf is not None:
            ax.text(x + 0.08, y, f"{leaf[i].item():.2g}", va="center", color=INK, fontsize=9)
    ax.set(title=title, xlim=(-0.25, tree.horizon + 0.45), ylim=(-0.7, len(leaves) - 0.3))
    ax.axis("off")
    return ax


def _places(tree: Tree) -> tuple[dict, list]:
    """Where each state and response of the first prompt stands, and its responses in order."""
    leaves = [y for y in tree.leaves() if y[0] == 0]
    height = {y: len(leaves) - 1 - i for i, y in enumerate(sorted(leaves))}
    places = {y: (len(y) - 1, float(height[y])) for y in leaves}
    inner = [prefix for level in tree.prefixes() for prefix in level if prefix[0] == 0]
    for prefix in inner:
        below = [h for y, h in height.items() if y[: len(prefix)] == prefix]
        places[prefix] = (len(prefix) - 1, sum(below) / len(below))
    return places, leaves


def _edge(ax, start, end, token, colour, width, number, alpha) -> None:
    (x0, y0), (x1, y1) = start, end
    ax.plot([x0, x1], [y0, y1], color=colour, linewidth=width, alpha=alpha, zorder=1,
            solid_capstyle="round")  # fmt: skip
    label = token if number is None else f"{token}  {number:+.2f}"
    ax.text(
        x0 + 0.62 * (x1 - x0), y0 + 0.62 * (y1 - y0), label, ha="center", va="center",
        fontsize=9, color=INK, alpha=max(alpha, 0.45), zorder=4,
        bbox=dict(facecolor=PAPER, edgecolor="none", pad=1.2, alpha=0.85),
    )  # fmt: skip


def _disc(ax, place, value) -> None:
    label = "" if value is None else f"{value:.2f}"
    size = 9 if value is None else 24
    ax.plot(*place, "o", color=PAPER, markeredgecolor=INK, markersize=size, zorder=2)
    ax.text(*place, label, ha="center", va="center", fontsize=8, color=INK, zorder=5)
