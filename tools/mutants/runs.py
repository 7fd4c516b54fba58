"""Plants faults in a copy of the repository and runs the tests that execute the broken function.

Once: every test runs without a fault, and what it calls and how long it takes is kept (the map,
in _build/mutants). Then, a fault at a time: a fork of this process, which has loaded torch and
transformers but not qlearn, runs the tests that call the broken function, the quickest first. Where
all pass, the other tests of the module run too (a cached result is not called twice).
"""

import compileall
import contextlib
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from tools.mutants.faults import ROOT, Fault, plant

COPIED = ("qlearn", "tests", "tools", "book", "pyproject.toml", "conftest.py", "CHANGELOG.md")
TESTS = ("tests/exact", "tests/lm", "tests/findings", "tests/studies", "tests/train", "tests/show",
         "tests/test_losses.py", "tests/test_losses_edges.py", "tests/test_errata.py",
         "tests/test_cli.py", "tests/test_options.py")  # fmt: skip
HEAVY = ("transformers", "transformers.models.auto.modeling_auto", "scipy.stats", "hypothesis",
         "datasets", "trl", "yaml", "tokenizers", "accelerate", "pyarrow")  # fmt: skip
# Each of these is a good part of the half second that a fault costs before its first test.
QUICK = ("-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:unraisableexception",
         "-p", "no:threadexception", "-p", "no:warnings", "-p", "no:logging")  # fmt: skip
SLOW = 10.0  # seconds: such a test runs only where no other calls the function
STAGES = (30.0, 10.0)  # seconds of tests, by the map, that a fault may cost in each round
FOLDER = ROOT / "_build" / "mutants"
WORKPLACE = ROOT  # each worker has its own


def preload() -> None:
    """Loads what every test needs, but for qlearn, before this process is forked."""
    torch.set_num_threads(1)
    torch.set_num_threads = lambda n: None  # two workers share the machine
    os.environ |= {"QLEARN_SEEDS": "12", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import transformers

    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "Trainer",
                 "GPTNeoXForCausalLM", "PreTrainedTokenizerFast"):  # fmt: skip
        getattr(transformers, name)
    import trl

    for name in ("DPOTrainer", "DPOConfig", "RewardTrainer"):
        with contextlib.suppress(Exception):
            getattr(trl, name)
    gc.collect()
    gc.freeze()  # so that no fork walks over all of this again


def set_up_worker(folder: str) -> None:
    """A copy of what the tests need, for this process alone, with its bytecode."""
    global WORKPLACE
    WORKPLACE = Path(folder) / str(os.getpid())
    for name in COPIED:
        source, target = ROOT / name, WORKPLACE / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
        elif source.exists():
            shutil.copy2(source, target)
    for name in ("qlearn", "tests"):
        compileall.compile_dir(WORKPLACE / name, quiet=2)


class Watch:
    """A pytest plugin: which functions of qlearn each test calls, and how long it takes."""

    def __init__(self):
        self.calls, self.seconds, self.failed = defaultdict(set), {}, set()
        self.prefix = str(WORKPLACE / "qlearn") + os.sep

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        calls, prefix, skip = self.calls[item.nodeid], self.prefix, len(str(WORKPLACE)) + 1

        def called(frame, event, _):
            code = frame.f_code
            if event == "call" and code.co_filename.startswith(prefix):
                name = code.co_qualname.split(".<locals>")[0]
                calls.add(f"{code.co_filename[skip:]}:{name}")

        start = time.perf_counter()
        sys.setprofile(called)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            self.seconds[item.nodeid] = time.perf_counter() - start

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)


def _pytest(arguments: list[str], limit: int, plugin: object = None) -> int:
    """The exit code of pytest in a fork of this process, in the worker's copy."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    signal.alarm(limit)  # kills the fork: a loop that never ends is noticed, too
    code = 3
    try:
        os.chdir(WORKPLACE)
        sys.path[:] = [str(WORKPLACE), *(p for p in sys.path if p not in ("", str(ROOT)))]
        for name in [x for x in sys.modules if x.split(".")[0] == "tools"]:
            del sys.modules[name]
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        stop = [] if plugin else ["-x"]
        code = int(pytest.main([*QUICK, *stop, *arguments], plugins=[plugin] if plugin else []))
    finally:
        os._exit(code)


class Kept(Watch):
    """A watch that writes what it saw to a file, from the fork in which it ran."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def pytest_sessionfinish(self):
        seen = {
            test: {"seconds": self.seconds[test], "calls": sorted(calls)}
            for test, calls in self.calls.items() if test not in self.failed
        }  # fmt: skip
        text = json.dumps({"tests": seen, "failed": sorted(self.failed)})
        Path(self.path).write_text(text, encoding="utf-8")


def watch(file: str) -> dict:
    """What every test of one file calls: {tests: {id: {seconds, calls}}, failed: [id]}."""
    path = WORKPLACE / "seen.json"
    path.unlink(missing_ok=True)
    _pytest([file], 1200, Kept(str(path)))
    return json.loads(path.read_text(encoding="utf-8"))


def map_tests(pool, say=print) -> dict[str, dict]:
    """{test: {seconds, calls}} of all tests, those of unchanged files as last time.

    Raises: SystemExit where a test fails without a fault.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    kept = FOLDER / "map.json"
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    files, digests = [], {}
    for name in TESTS:
        path = ROOT / name
        files += [path] if path.is_file() else sorted(path.glob("test_*.py"))
    shared = [path for path in sorted(ROOT.glob("tests/**/*.py")) if path not in files]
    helpers = b"".join(path.read_bytes() for path in shared if "test_" not in path.name)
    for path in files:
        name = str(path.relative_to(ROOT))
        digests[name] = hashlib.sha256(path.read_bytes() + helpers).hexdigest()[:12]
    new = [x for x, digest in digests.items() if known.get(x, {}).get("digest") != digest]
    say(f"{len(new)} of {len(digests)} test files are run once to see what they call")
    for name, seen in zip(new, pool.imap(watch, new), strict=True):
        known[name] = seen | {"digest": digests[name]}
        if seen["failed"]:
            raise SystemExit(f"{seen['failed'][0]} fails without any fault; mend it first.")
        kept.write_text(json.dumps(known), encoding="utf-8")
    return {test: x for name in digests for test, x in known[name]["tests"].items()}


def rounds(fault: Fault, tests: dict[str, dict]) -> tuple[list[str], list[str]]:
    """The tests that call the broken function, and the others of its module: quickest first."""
    parts = fault.function.split(".")
    methods = {f"{fault.module}:{'.'.join(parts[:n])}" for n in range(1, len(parts) + 1)}
    calling = {test for test, x in tests.items() if methods & set(x["calls"])}
    near = {
        t for t, x in tests.items() if any(c.startswith(fault.module + ":") for c in x["calls"])
    }
    found = zip((calling, near - calling), STAGES, strict=True)
    return tuple(_affordable(names, tests, seconds) for names, seconds in found)


def _affordable(names: set[str], tests: dict[str, dict], seconds: float) -> list[str]:
    """In order of time; the first of each test function before its other parameters."""
    quick = [x for x in names if tests[x]["seconds"] < SLOW] or list(names)
    by_time, seen = sorted(quick, key=lambda x: tests[x]["seconds"]), set()
    first, more = [], []
    for name in by_time:
        function = name.split("[")[0]
        (more if function in seen else first).append(name)
        seen.add(function)
    chosen, total = [], 0.0
    for name in first + more:
        total += tests[name]["seconds"]
        if chosen and total > seconds:
            break
        chosen.append(name)
    return chosen


def outcome(job: tuple[Fault, list[str], list[str]]) -> tuple[str, float]:
    """How the fault ended, and after how many seconds.

    killed, survived, or untested where no test of the map calls anything of the module.
    """
    start = time.perf_counter()
    return _outcome(*job), time.perf_counter() - start


def _outcome(fault: Fault, calling: list[str], near: list[str]) -> str:
    if not calling and not near:
        return "untested"
    target = WORKPLACE / fault.module
    original = target.read_text(encoding="utf-8")
    for stale in target.parent.glob(f"__pycache__/{target.stem}.*"):
        stale.unlink()
    target.write_text(plant(fault, original), encoding="utf-8")
    sys.dont_write_bytecode = True
    try:
        for names in (calling, near):
            if names:
                code = _pytest(names, limit=120)
                if code in (4, 5):  # no such tests: because of the fault, or is the map old?
                    target.write_text(original, encoding="utf-8")
                    if _pytest(["--collect-only", *names], limit=120):
                        raise SystemExit(f"{FOLDER}/map.json is old; delete it.")
                if code:
                    return "killed"
        return "survived"
    finally:
        sys.dont_write_bytecode = False
        target.write_text(original, encoding="utf-8")


def pool_of(workers: int, folder: str):
    """Processes that plant faults, each in a copy of its own."""
    return multiprocessing.get_context("fork").Pool(workers, set_up_worker, (folder,))
