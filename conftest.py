"""Lets the kernels that nbval starts, in book/, import a qlearn that nobody has installed."""

import os
from pathlib import Path

_inherited = os.environ.get("PYTHONPATH")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), *([_inherited] if _inherited else [])]
)
os.environ["TQDM_DISABLE"] = "1"
# By default idle threads spin for so long that two kernels on two cores are 30 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
