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

# file: (module with `run(seeds)`, or module:function, seeds)
MEASUREMENTS = {
    "tiny_dpo": ("qlearn.findings.slot_world", range(5)),
    "tiny_credit": ("qlearn.findings.credit_study", range(5)),
    "tiny_credit_second": ("qlearn.findings.credit_study:run_second", range(5)),
    "tiny_likelihood": ("qlearn.findings.displacement", range(5)),
    "tiny_rlhf": ("qlearn.findings.rlhf", range(5)),
    "tiny_rlhf_first": ("qlearn.findings.rlhf:run_first", range(5)),
    "tiny_search": ("qlearn.findings.search", range(5)),
    "proxy_map": ("qlearn.findings.proxy", range(20)),
    "tiny_proxy": ("qlearn.findings.borrowed", range(3)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*MEASUREMENTS, []], metavar="NAME")
    os.environ.setdefault("TQDM_DISABLE", "1")
    first, *others = parser.parse_args().names or MEASUREMENTS
    measure(first)  # alone: the others start from models that it trains
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(measure, others))


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
