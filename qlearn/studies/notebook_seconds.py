"""How long a reader waits for each chapter: its notebook, executed once from a fresh kernel.

The seconds are those of a clock on the wall, with the start of the kernel and every import in
them. They belong to one machine and to what else it was doing, so the number of its cores and its
load are measured too; a chapter's header prints them rounded (`qlearn.results.duration`).
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"


def run(seeds: Sequence[int], notebooks: Sequence[Path] | None = None) -> dict:
    """{seeds, cores, threads, load_before, load_while, seconds: {chapter: seconds}}.

    `notebooks` are those of the book by default. Each is executed once for each of `seeds`, which
    number the repetitions (a notebook fixes its own seeds), and the shortest time counts: whatever
    else the machine does can only add to it. A load is the average number of processes that ran or
    waited to run in the last minute: before the first notebook, and while they ran, their own
    included.

    Raises: ValueError where there are no notebooks, as in an installed package without the book.
    """
    notebooks = sorted(BOOK.glob("[0-9][0-9]-*.ipynb")) if notebooks is None else notebooks
    if not notebooks:
        raise ValueError(f"There are no notebooks in {BOOK}; run this in a checkout of the course.")
    load_before, loads, seconds = os.getloadavg()[0], [], {}
    for path in notebooks:
        seconds[path.stem] = round(min(execute(path) for _ in seeds), 1)
        loads.append(os.getloadavg()[0])
    return {
        "seeds": list(seeds), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "load_before": round(load_before, 2), "load_while": round(fmean(loads), 2),
        "seconds": seconds,
    }  # fmt: skip


def execute(path: Path) -> float:
    """Seconds to run a notebook in its own folder, from starting its kernel to its last cell.

    Raises: nbclient's CellExecutionError where a cell fails.
    """
    # Only who builds the book has these two; the other studies must import without them.
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    inherited = os.environ.get("PYTHONPATH")
    importable = os.pathsep.join([str(ROOT), *([inherited] if inherited else [])])
    start = time.perf_counter()
    client.execute(env={**os.environ, "PYTHONPATH": importable})
    return time.perf_counter() - start
