"""`make results`: measures again the numbers that the book quotes, one JSON file a measurement.

python -m qlearn.results               all of them
python -m qlearn.results tiny_dpo      one of them
"""

import argparse
import importlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# file: (module with `run(seeds)`, or module:function, seeds). The one with the longest runs and the
# fewest seeds comes early, so that no worker is idle at the end.
MEASUREMENTS = {
    "tiny_dpo": ("qlearn.studies.slot_world", range(5)),
    "tiny_proxy": ("qlearn.studies.proxy", range(3)),
    "tiny_credit": ("qlearn.studies.credit", range(5)),
    "tiny_credit_second": ("qlearn.studies.credit:run_second", range(5)),
    "tiny_likelihood": ("qlearn.studies.displacement", range(5)),
    "tiny_rlhf": ("qlearn.studies.rlhf", range(5)),
    "tiny_rlhf_first": ("qlearn.studies.rlhf:run_first", range(5)),
    "tiny_search": ("qlearn.studies.search", range(5)),
    "proxy_map": ("qlearn.studies.exactness", range(20)),
    "notebook_seconds": ("qlearn.studies.notebook_seconds", range(1)),
}
TIMED = "notebook_seconds"  # measured last and alone: what runs beside it would count


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m qlearn.results", description=__doc__.splitlines()[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MEASUREMENTS))
    names = parser.parse_args().names or list(MEASUREMENTS)
    for name in names:
        if name not in MEASUREMENTS:
            parser.error(f"there is no measurement {name!r}; choose from {', '.join(MEASUREMENTS)}")
    os.environ.setdefault("TQDM_DISABLE", "1")
    untimed = [name for name in names if name != TIMED]
    for first in untimed[:1]:
        measure(first)  # alone: the others start from models that it trains
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(measure, untimed[1:]))
    if TIMED in names:
        measure(TIMED)


def measure(name: str) -> None:
    """Writes the results file of one measurement."""
    module, seeds = MEASUREMENTS[name]
    module, _, function = module.partition(":")
    found = getattr(importlib.import_module(module), function or "run")(list(seeds))
    found = {"command": f"python -m qlearn.results {name}", **found}
    path = Path(__file__).parent / f"{name}.json"
    path.write_text(json.dumps(rounded(found), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def rounded(value):
    """Five significant digits: more would be noise in the diff."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
