"""A line of text with a number at each token: bars in reading order, one panel a measure."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from qlearn.lm.grammar import EOS
from qlearn.show.trees import BLAME, INK, NEUTRAL, PAPER, PRAISE


def draw_line(
    words: Sequence[str], panels: dict[str, Sequence[float]], *, signed: Sequence[str] = ()
) -> Figure:
    """One row of bars for each panel {title: a number a token}; returns the figure.

    Panels named in `signed` are blue above 0 and orange below; the others are grey.
    """
    size = (max(8, 0.55 * len(words)), 0.9 + 1.7 * len(panels))
    figure, axes = plt.subplots(
        len(panels), 1, figsize=size, sharex=True, squeeze=False, layout="constrained",
        facecolor=PAPER,
    )  # fmt: skip
    for ax, (title, values) in zip(axes[:, 0], panels.items(), strict=True):
        colours = [PRAISE if v > 0 else BLAME for v in values] if title in signed else NEUTRAL
        ax.bar(range(len(words)), values, color=colours)
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set_title(title, loc="left", fontsize=10, color=INK)
        ax.set_facecolor(PAPER)
        ax.spines[["top", "right", "bottom"]].set_visible(False)
    labels = ["(end)" if word == EOS else word for word in words]
    axes[-1, 0].set_xticks(range(len(words)), labels, rotation=45, ha="right")
    return figure
