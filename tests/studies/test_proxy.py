"""The loan from a small pair to a larger base, measured."""

from qlearn.studies import proxy


def test_claim_a_measure_prices_the_distance_from_its_base(model, other, tokenizer, monkeypatch):
    """The base is at no distance from itself; another policy pays β per nat of its samples."""
    monkeypatch.setattr(proxy, "N_POSTS", 6)
    own = proxy.measure(model, model, tokenizer, 0.5, seed=0)["sample"]
    assert own["kl"] == 0.0 and own["objective"] == own["reward"]
    apart = proxy.measure(model, other, tokenizer, 0.5, seed=0)["sample"]
    assert apart["reward"] == own["reward"] and apart["kl"] > 0.1
    assert abs(apart["objective"] - (apart["reward"] - 0.5 * apart["kl"])) < 1e-6
