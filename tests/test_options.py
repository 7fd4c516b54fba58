"""Ranges, texts and outputs are checked before any work, each in one sentence."""

from dataclasses import dataclass

import pytest

from qlearn import options
from qlearn.errors import InputError


@dataclass
class Config:
    """One field of each kind of range."""

    beta: float = options.option(0.1, "weight", above=0)
    seed: int = options.option(0, "seed", at_least=0, at_most=options.LARGEST_SEED)
    share: float | None = options.option(None, "share", at_least=0, below=1)


@pytest.mark.parametrize(
    "odd",
    [
        {"beta": 0.0}, {"beta": float("nan")}, {"beta": float("inf")},
        {"seed": -1}, {"seed": 10**20}, {"seed": 10**400}, {"share": 1.0},
    ],
)  # fmt: skip
def test_bug_a_number_outside_its_range_is_refused_by_name(odd):
    with pytest.raises(InputError, match=f"^{next(iter(odd))} must "):
        options.check_ranges(Config(**odd))


def test_claim_the_ends_of_a_range_and_what_is_not_set_pass():
    options.check_ranges(Config(beta=1e-300, seed=options.LARGEST_SEED, share=0.0))
    options.check_ranges(Config(share=None))


def test_bug_half_a_character_is_refused_with_its_place():
    with pytest.raises(InputError, match="character 3 is half of a character"):
        options.check_text("--prompt", "ab\ud83d")
    options.check_text("--prompt", "ab😀")


def test_bug_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(InputError, match=r"there is no directory .*; pass another --html"):
        options.check_output("--html", str(tmp_path / "none" / "x.html"))
    with pytest.raises(InputError, match="it is a directory"):
        options.check_output("--html", str(tmp_path))
    options.check_output("--html", str(tmp_path / "x.html"))
    assert not (tmp_path / "x.html").exists()
