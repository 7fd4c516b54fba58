"""What the edge tests share: who is tested, what counts as a refusal, numbers at the edge."""

import importlib
import inspect
import math
import pkgutil
import re

import pytest
from hypothesis import settings

# No deadline and no database: the machine is shared and the runs should be alike everywhere.
few = settings(deadline=None, database=None, derandomize=True, max_examples=40)
TESTED: set[str] = set()  # names of public functions that an edge test was written for


def edge(*functions):
    """Marks a test as the edge test of these public functions (and classes, and methods)."""
    for function in functions:
        function = getattr(function, "fget", None) or getattr(function, "func", function)
        TESTED.add(f"{function.__module__}.{function.__qualname__}")
    return lambda test: test


def public_names(package: str) -> set[str]:
    """Every public function, class with checks of its own and public method under `package`."""
    module = importlib.import_module(package)
    modules = [module]
    if hasattr(module, "__path__"):
        names = (info.name for info in pkgutil.iter_modules(module.__path__, f"{package}."))
        modules += [importlib.import_module(name) for name in names]
    found = set()
    for module in modules:
        for name, thing in vars(module).items():
            ours = getattr(thing, "__module__", None) == module.__name__
            if name.startswith("_") or not ours:
                continue
            if inspect.isfunction(thing):
                found.add(f"{module.__name__}.{name}")
            elif inspect.isclass(thing):
                own = vars(thing)
                if "__post_init__" in own:
                    found.add(f"{module.__name__}.{name}")
                methods = [n for n, x in own.items() if not n.startswith("_") and is_method(x)]
                found.update(f"{module.__name__}.{name}.{n}" for n in methods)
    return found


def is_method(x) -> bool:
    return inspect.isfunction(x) or isinstance(x, classmethod | staticmethod | property)


def check_refused(call, words: str = ".") -> None:
    """The call ends in a ValueError of one sentence, which holds `words` (a pattern)."""
    with pytest.raises(ValueError, match=words) as caught:
        call()
    sentence = str(caught.value)
    assert sentence[:1].isalpha() and sentence.endswith("."), sentence
    assert "\n" not in sentence and len(sentence) < 320, sentence
    assert not re.search(r"\. [A-Z]", sentence), f"not one sentence: {sentence}"


def close(x: float, y: float, size: float = 1.0, rel: float = 1e-11) -> bool:
    """Equal to rounding, or the same infinity, or both NaN."""
    if math.isnan(x) or math.isnan(y):
        return math.isnan(x) and math.isnan(y)
    return x == y or abs(x - y) <= rel * max(abs(y), size)
