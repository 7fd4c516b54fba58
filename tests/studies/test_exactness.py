"""The map of exactness: DeRa in a whole world, by enumeration."""

from qlearn.lm.worlds import SlotWorld
from qlearn.studies import exactness


def test_claim_dera_in_the_slot_world_loses_the_kl_it_misses():
    """J of the mix at β/α is V* less β/α · KL(mix ‖ exact): at most V*, and V* itself at α = 1."""
    found = exactness.slot_world_dera(SlotWorld())
    for alpha, row in found.items():
        assert row["mixed_objective"] <= row["value"] + 1e-10
        assert row["kl"] > 1e-3 or alpha == "1"
    assert abs(found["1"]["mixed_objective"] - found["1"]["value"]) < 1e-10
    assert found["4"]["value"] - found["4"]["mixed_objective"] > 0.01
