"""Draws the README's picture, book/assets/cover.png: one line, its surprise, its exact credit.

python tools/draw_cover.py
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qlearn.lm.worlds import SlotWorld  # noqa: E402
from qlearn.show.lines import draw_line  # noqa: E402
from qlearn.studies.slot_world import puzzle  # noqa: E402

SURPRISE = "how surprising each word is"
CREDIT = "how much each word is to blame: the soft advantage (54k and Monday are false)"


def main():
    world = SlotWorld()
    post, words = puzzle(world)
    truth = world.explain(post, words, beta=0.5)[:-1]  # without the end
    panels = {
        SURPRISE: [-token["logp_ref"] for token in truth],
        CREDIT: [token["advantage"] for token in truth],
    }
    figure = draw_line(words[:-1], panels, signed=(CREDIT,))
    figure.savefig(ROOT / "book" / "assets" / "cover.png", dpi=110)


if __name__ == "__main__":
    main()
