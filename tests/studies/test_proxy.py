"""The loan from a small pair to a larger base, measured."""

import random
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from qlearn.exact.soft import soft_value_prior
from qlearn.lm.decode import Decoded
from qlearn.lm.logprobs import sum_logps
from qlearn.lm.models import config_of, load_model
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.lm.worlds import World
from qlearn.studies import proxy
from qlearn.studies.displacement import return_law


def test_claim_a_measure_prices_the_distance_from_its_base(model, other, tokenizer, monkeypatch):
    """The base is at no distance from itself; another policy pays β per nat of its samples."""
    monkeypatch.setattr(proxy, "N_POSTS", 6)
    own = proxy.measure(model, model, tokenizer, 0.5, seed=0)["sample"]
    assert own["kl"] == 0.0 and own["objective"] == own["reward"]
    apart = proxy.measure(model, other, tokenizer, 0.5, seed=0)["sample"]
    assert apart["reward"] == own["reward"] and apart["kl"] > 0.1
    assert abs(apart["objective"] - (apart["reward"] - 0.5 * apart["kl"])) < 1e-6


def test_claim_a_measure_is_of_means_over_posts(model, other, tokenizer, monkeypatch):
    """Three lines by the writers and one cut short: rewards, lengths and nats worked out anew."""
    world, asked = World(), []
    posts = world.posts(4, "held out 9")
    lines = [world.write(post, random.Random(i)) for i, post in enumerate(posts)]
    lines[1] = lines[1][:4]

    def decode(policy, _, prompts, how, seed):
        asked.append((policy, prompts, how.decoder, how.max_new_tokens, seed))
        ids = [tokenizer.convert_tokens_to_ids(x) for x in lines]
        return [
            Decoded("", tokenizer(post.prompt).input_ids, x, 0.0, ended=True)
            for post, x in zip(posts, ids, strict=True)
        ]

    monkeypatch.setattr(proxy, "N_POSTS", 4)
    monkeypatch.setattr(proxy, "decode", decode)
    found = proxy.measure(model, other, tokenizer, 0.25, seed=9)
    prompts = [post.prompt for post in posts]
    assert asked == [(model, prompts, decoder, world.longest + 4, 9)
                     for decoder in ("sample", "greedy")]  # fmt: skip
    plain = {
        "reward": fmean(world.reward(p, x) for p, x in zip(posts, lines, strict=True)),
        "unreadable": 0.25,
        "length": fmean(map(len, lines)),
    }
    assert found["greedy"] == pytest.approx(plain)
    rows = [(tokenizer(post.prompt).input_ids, tokenizer.convert_tokens_to_ids(x))
            for post, x in zip(posts, lines, strict=True)]  # fmt: skip
    kl = (sum_logps(model, rows, 8) - sum_logps(other, rows, 8)).mean().item()
    assert found["sample"] == pytest.approx(
        plain | {"kl": kl, "objective": plain["reward"] - 0.25 * kl}, abs=1e-4
    )


def test_claim_the_base_is_drawn_once_from_its_seed_and_learns_from_the_writers(made, tokenizer):
    """Its first weights are those of the seed, and drawing them disturbs no other draw."""
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    folder = proxy.base_run(3)
    assert torch.equal(torch.rand(2), expected)
    config = made[folder]
    assert (config.seed, config.data, config.world_rows) == (3, "slots", 12_000)
    assert (config.learning_rate, config.per_device_train_batch_size) == (0.002, 16)
    torch.manual_seed(3)
    drawn = GPTNeoXForCausalLM(config_of(proxy.BASE, tokenizer))
    start = load_model(config.model, load_tokenizer(config.model))
    assert all(
        torch.equal(a, b) for a, b in zip(drawn.parameters(), start.parameters(), strict=True)
    )
    mark = Path(config.model, "config.json")
    before = mark.stat().st_mtime_ns
    assert proxy.base_run(3) == folder and mark.stat().st_mtime_ns == before


def test_claim_each_mix_is_priced_at_what_it_aims_at(made, by_name, monkeypatch):
    """Which models are mixed at which exponent, against which reference, at which β/α."""
    by_name(proxy)
    monkeypatch.setattr(proxy, "base_run", lambda seed: f"base {seed}")
    monkeypatch.setattr(proxy, "tilted", lambda *given: given)
    monkeypatch.setattr(proxy, "measure", lambda *given: given)
    found = proxy.run_seed(7)
    asked = list(made.items())
    (small, start), (dpo, plain) = asked[:2]
    assert (start.seed, plain.seed, plain.model, plain.beta) == (7, 7, small, 0.5)
    at_price = {config.beta: folder for folder, config in asked[2:]}
    assert at_price.keys() == {2.0, 0.1}
    assert all((config.seed, config.model) == (7, small) for _, config in asked[2:])
    tokenizer = f"tokenizer of {small}"
    base, untuned, tuned, high, low = (
        (folder, tokenizer) for folder in ("base 7", small, dpo, at_price[2.0], at_price[0.1])
    )
    expected = {
        "base": (base, base, 0.5),
        "untuned": (untuned, untuned, 0.5),
        "tuned": (tuned, untuned, 0.5),
        "base_alpha_0_5": ((base, tuned, untuned, 0.5), base, 1.0),
        "base_alpha_1": ((base, tuned, untuned, 1.0), base, 0.5),
        "base_alpha_2": ((base, tuned, untuned, 2.0), base, 0.25),
        "dera_0_25": ((untuned, tuned, untuned, 0.25), untuned, 2.0),
        "dpo_high": (high, untuned, 2.0),
        "dera_5": ((untuned, tuned, untuned, 5.0), untuned, 0.1),
        "dpo_low": (low, untuned, 0.1),
    }
    assert found == {
        name: (policy, reference, tokenizer, pytest.approx(price), 7)
        for name, (policy, reference, price) in expected.items()
    }


def test_claim_the_results_file_has_the_worlds_value_and_every_seed(made, monkeypatch):
    monkeypatch.setattr(proxy, "run_seed", lambda seed: {"base": {"x": float(seed)}})
    found = proxy.run([1, 4])
    returns, log_ref = return_law(World())
    value = soft_value_prior(returns, log_ref, 0.5).item()
    assert found["value"] == pytest.approx(value, abs=1e-9)
    assert found["seeds"] == [1, 4] and found["posts_per_seed"] == proxy.N_POSTS
    assert found["per_seed"] == [{"base": {"x": 1.0}}, {"base": {"x": 4.0}}]
    assert found["mean"]["base"]["x"]["mean"] == 2.5
