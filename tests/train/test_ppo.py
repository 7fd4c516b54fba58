"""PPO and RLOO: gradients against the exact ones, where the score is paid, step 0, the optimum."""

import copy
import itertools
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlearn import losses
from qlearn.errors import InputError, RunStopped
from qlearn.exact.training import bandit_gradient
from qlearn.lm.data import Example
from qlearn.lm.models import load_model
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.lm.worlds import World, as_text
from qlearn.train import engine, ppo, reward, rollout, steps
from qlearn.train.ppo import PPOConfig
from qlearn.train.rollout import Rollout, Task

EOS = 0
PROMPTS = [Example(i, [5 + i, 6, 7, 8][: 2 + i % 3], ()) for i in range(16)]


def config(**changes):
    given = dict(
        model="tiny", data="slots", output_dir="unused", beta=0.5, per_device_train_batch_size=16,
        logging_steps=1, learning_rate=1e-3, warmup_steps=0, max_new_tokens=6,
    )  # fmt: skip
    return PPOConfig(**(given | changes))


def judge(rows):
    """Short responses and those that begin with token 9 are good."""
    return torch.tensor([(ids[0] == 9) - 0.2 * len(ids) for _, ids in rows])


def task(policy, reference, tokenizer, **changes):
    return Task(policy, reference, tokenizer, changes.pop("judge", judge), config(**changes))


def respond(job, seed=0):
    return rollout.respond(job, PROMPTS, torch.Generator().manual_seed(seed))


def plain_logps(model, example):
    """log π of one response the slow way: (T,)."""
    prompt, ids = example.prompt, example.completions[0]
    logits = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    return logits[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]


# --- gradients ---------------------------------------------------------------------------------


def test_eq_02_rloo_gradient_is_the_bandits_in_expectation():
    """Averaged over all 125 draws of k = 3 of 5 responses it is π(y)[G(y) − E G]. `eq-rloo`"""
    generator = torch.Generator().manual_seed(0)
    theta, log_ref, score = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    log_ref, beta, total = log_ref.log_softmax(0), 0.3, torch.zeros(5, dtype=torch.float64)
    theta.requires_grad_()
    p = theta.detach().softmax(0)
    for draw in itertools.product(range(5), repeat=3):
        logp, y = theta.log_softmax(0), list(draw)
        old = logp.detach()
        returns = (score - beta * (old - log_ref))[y]
        advantage = losses.leave_one_out(returns[None])[0]
        loss = steps.surrogate(logp[y], old[y], advantage, clip=0.2)["loss/policy_avg"].mean()
        total -= p[y].prod() * torch.autograd.grad(loss, theta)[0]
    exact = bandit_gradient(p.log(), score, log_ref, beta)
    assert exact.abs().max() > 0.05
    assert (total - exact).abs().max() < 1e-12


def test_eq_03_first_pass_of_ppo_is_reinforce(model, other, tokenizer):
    """Before any update the clipped surrogate's gradient is that of −Σ A log π / tokens."""
    model.get_output_embeddings().weight.data[EOS] *= 3  # so that some responses end
    job = task(model, other, tokenizer, vf_coef=0.0, num_generations=1, max_new_tokens=12)
    seen, head = respond(job), ppo.value_head(model)
    assert seen.mask.sum(1).unique().numel() > 1
    value = ppo.values(job, head, seen)
    advantage, target = losses.gae(seen.rewards(0.5), value, seen.mask)
    ids = list(range(len(PROMPTS)))
    batch = rollout.collate(rollout.as_pairs(seen.examples))
    table = ppo.token_terms(job, head, seen, value, advantage, target, batch, ids)["loss"]
    ((table * seen.mask).sum() / seen.mask.sum()).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    gain = sum(
        (a[: len(e.completions[0])] * plain_logps(model, e)).sum()
        for a, e in zip(advantage, seen.examples, strict=True)
    )
    (-gain / seen.mask.sum()).backward()
    for mine, p in zip(found, model.parameters(), strict=True):
        assert (mine - p.grad).abs().max() <= 1e-4 * p.grad.abs().max() + 1e-7


def test_claim_an_update_is_the_mean_over_all_its_actions(model, other, tokenizer):
    """Trap 17: one forward pass of 64 responses or sixteen of 4 give the same steps."""
    for algorithm in ("ppo", "rloo"):
        found = []
        for size, parts in ((16, 1), (4, 4)):
            job = task(
                copy.deepcopy(model), other, tokenizer, algorithm=algorithm, max_steps=2,
                num_mini_batches=2, max_new_tokens=4, num_generations=2,
                per_device_train_batch_size=size, gradient_accumulation_steps=parts,
            )  # fmt: skip
            train = {"ppo": ppo.train_ppo, "rloo": ppo.train_rloo}[algorithm]
            found.append([(x["loss"], x["grad_norm"]) for x in train(job, PROMPTS)])
        assert torch.allclose(*map(torch.tensor, found), atol=2e-5)


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_eq_06_both_reach_the_exact_optimum_of_one_token(model, tokenizer, algorithm):
    """One state, one token: J rises from E_ref R to β log E_ref exp(R/β), computed from the logits.

    At least nine tenths of the distance, and β log π/π_ref has slope 1 in R, so β is the right one.
    """
    prompt, beta = [5, 6, 7], 0.5
    score = torch.randn(len(tokenizer), generator=torch.Generator().manual_seed(1))
    reference = copy.deepcopy(model)
    job = task(
        model, reference, tokenizer, algorithm=algorithm, max_new_tokens=1, max_steps=30,
        missing_eos_penalty=0.0, learning_rate=1e-2, num_mini_batches=1, num_generations=8,
        judge=lambda rows: torch.tensor([score[ids[0]] for _, ids in rows]),
    )  # fmt: skip

    {"ppo": ppo.train_ppo, "rloo": ppo.train_rloo}[algorithm](
        job, [Example(i, prompt, ()) for i in range(16)]
    )
    with torch.no_grad():
        logp, log_ref = (
            m(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for m in (model, reference)
        )
    implied, p = beta * (logp - log_ref), logp.exp()
    start, end = (log_ref.exp() * score).sum(), (p * (score - implied)).sum()
    best = beta * torch.logsumexp(log_ref + score / beta, 0)
    assert best > start + 0.3
    assert start + 0.9 * (best - start) < end < best
    spread = score - (p * score).sum()
    assert (p * spread * implied).sum() / (p * spread**2).sum() == pytest.approx(1, abs=0.15)


# --- responses, scores, ends -------------------------------------------------------------------


def test_eq_03_the_score_is_paid_at_the_last_token(model, other, tokenizer):
    """Every token pays β log π/π_ref of itself, checked one by one; the sum is the return."""
    job = task(model, other, tokenizer, num_generations=1)
    seen = respond(job)
    rewards, score = seen.rewards(0.5), judge(rollout.as_pairs(seen.examples))
    assert len(score) == len(rewards) == 16
    for row, total, s, ended, example in zip(
        rewards, seen.returns(0.5), score, seen.ended, seen.examples, strict=True
    ):
        with torch.no_grad():
            expected = -0.5 * (plain_logps(model, example) - plain_logps(other, example))
        n = len(example.completions[0])
        expected[n - 1] += s - (0.0 if ended else 1.0)
        assert torch.allclose(row[:n], expected, atol=1e-4) and not row[n:].any()
        assert total.item() == pytest.approx(expected.sum().item(), abs=1e-4)


def test_claim_a_line_that_has_not_ended_is_not_complete(tokenizer):
    """The same words earn UNREADABLE less without the end of text, and pay the penalty beside."""
    world = World()
    post = world.posts(1, "end")[0]
    prompt = tokenizer(post.prompt).input_ids
    line = world.sft_rows(1, "end")[0]
    assert line["prompt"] == post.prompt
    ids = tokenizer(line["completion"], add_special_tokens=False).input_ids
    score = rollout.world_judge(world, [post], tokenizer)
    whole, cut = score([(prompt, [*ids, EOS]), (prompt, ids)]).tolist()
    words = [tokenizer.decode([i]).strip() for i in ids]
    assert whole == pytest.approx(world.reward(post, [*words, tokenizer.eos_token]))
    assert as_text([*words, tokenizer.eos_token]) == line["completion"]
    assert cut == pytest.approx(whole - 2.0)
    # padding written in the middle is a word like any other, not a gap that may be skipped
    assert score([(prompt, [*ids[:3], 1, *ids[3:], EOS])])[0] < whole


def test_claim_missing_ends_are_penalised_and_counted(model, tokenizer):
    """Cut responses lose missing_eos_penalty; nothing else does."""
    given = dict(judge=lambda rows: torch.zeros(len(rows)), missing_eos_penalty=0.7)
    model.get_output_embeddings().weight.data[EOS] *= 3  # so that some end
    seen = respond(task(model, model, tokenizer, max_new_tokens=12, **given))
    assert 0 < seen.ended.sum() < len(seen.ended)
    assert torch.equal(seen.score, torch.where(seen.ended, 0.0, -0.7))
    for example, ended in zip(seen.examples, seen.ended, strict=True):
        assert (example.completions[0][-1] == EOS) == ended
        assert ended or len(example.completions[0]) == 12
    assert seen.metrics(0.5)["val/num_eos_tokens"] == seen.ended.sum()


def test_claim_responses_are_samples_of_the_whole_distribution(model, tokenizer):
    """4,000 first tokens have the frequencies of softmax(logits): χ² with merged rare tokens."""
    job = task(model, model, tokenizer, max_new_tokens=1, num_generations=4000)
    seen = rollout.respond(job, PROMPTS[:1], torch.Generator().manual_seed(3))
    with torch.no_grad():
        p = model(torch.tensor([PROMPTS[0].prompt])).logits[0, -1].softmax(-1)
    count = torch.bincount(
        torch.tensor([e.completions[0][0] for e in seen.examples]), minlength=len(p)
    )
    common = p > 5 / 4000
    seen_, expected = (
        torch.cat([x[common], x[~common].sum()[None]]) for x in (count.float(), 4000 * p)
    )
    chi = ((seen_ - expected) ** 2 / expected).sum().item()
    n = len(expected) - 1
    assert n > 20 and abs(chi - n) < 4 * (2 * n) ** 0.5
    assert torch.allclose(seen.logp[:, 0].exp(), p[[e.completions[0][0] for e in seen.examples]])


# --- step 0 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_claim_before_the_first_update_kl_is_0_and_ratio_1(model, tokenizer, algorithm):
    job = task(
        model, copy.deepcopy(model), tokenizer, algorithm=algorithm, max_steps=1,
        num_mini_batches=1,
    )  # fmt: skip
    first = {"ppo": ppo.train_ppo, "rloo": ppo.train_rloo}[algorithm](job, PROMPTS)[0]
    assert first["objective/kl"] == 0.0 == first["objective/non_score_reward"]
    assert first["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert first["val/ratio_var"] < 1e-8 and first["policy/clipfrac_avg"] == 0


class Drifting(torch.nn.Module):
    """A head whose numbers differ at every call, as with dropout left on."""

    def __init__(self, head):
        super().__init__()
        self.head, self.calls = head, 0
        self.bias = None

    @property
    def weight(self):
        self.calls += 1
        return self.head.weight * (1 + 0.05 * self.calls)


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_bug_log_probabilities_that_differ_stop_the_run(model, tokenizer, algorithm, monkeypatch):
    """Planted: a drifting policy (ratio), then a drifting reference of equal weights (KL)."""
    train = {"ppo": ppo.train_ppo, "rloo": ppo.train_rloo}[algorithm]
    reference = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    head, off = model.get_output_embeddings(), Drifting(model.get_output_embeddings())
    # sampling uses the true head; the log-probabilities that follow do not
    monkeypatch.setattr(Drifting, "forward", lambda self, x: head(x), raising=False)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: off)
    with pytest.raises(RunStopped, match="log-ratios to itself"):
        train(task(model, reference, tokenizer, algorithm=algorithm), PROMPTS)
    monkeypatch.undo()
    stray = Drifting(reference.get_output_embeddings())
    monkeypatch.setattr(reference, "get_output_embeddings", lambda: stray)
    with pytest.raises(RunStopped, match="policy and reference are the same weights"):
        train(task(model, reference, tokenizer, algorithm=algorithm), PROMPTS)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_claim_an_honest_step_0_passes_in_batches_of_other_shapes(
    model, tokenizer, algorithm, dtype
):
    """The update's tables are not the rollout's: rounding differs, and is let through."""
    how = {"per_device_train_batch_size": 3, "max_steps": 1, "dtype": dtype}
    job = task(model, copy.deepcopy(model), tokenizer, algorithm=algorithm, **how)
    train = {"ppo": ppo.train_ppo, "rloo": ppo.train_rloo}[algorithm]
    assert abs(train(job, PROMPTS)[0]["objective/kl"]) < 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_bug_dropout_stops_a_run_at_step_0(model, tokenizer, algorithm, dtype):
    """In bfloat16 an absolute slack of 0.1 a token let a rate of 0.01 through."""
    job = task(model, copy.deepcopy(model), tokenizer, algorithm=algorithm, dtype=dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.01
    model.train()
    train = {"ppo": ppo.train_ppo, "rloo": ppo.train_rloo}[algorithm]
    with pytest.raises(RunStopped, match="where rounding explains"):
        train(job, PROMPTS)


# --- runs --------------------------------------------------------------------------------------

NAMES = {  # TRL's former PPOTrainer
    "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
    "objective/scores", "policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg",
    "val/ratio", "val/ratio_var", "val/num_eos_tokens", "policy/entropy_avg", "lr", "episode",
    "eps",
}  # fmt: skip


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_claim_the_recipes_run_end_to_end_and_repeat(tmp_path, algorithm):
    """Same seed, same metrics; TRL's names; a saved policy that transformers loads."""
    runs = []
    for name in ("a", "b"):
        folder = tmp_path / name
        given = config(
            algorithm=algorithm, world_rows=40, max_steps=3, output_dir=str(folder),
            per_device_train_batch_size=4,
        )  # fmt: skip
        summary = ppo.run(given)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        timing = engine.TIMING_KEYS
        runs.append([{k: v for k, v in x.items() if k not in timing} for x in lines])
    assert runs[0] == runs[1] and [x["episode"] for x in runs[0]] == [16, 32, 48]
    assert set(lines[0]) >= NAMES
    assert (
        (algorithm == "ppo") == ("loss/value_avg" in lines[0]) == ("val/clipfrac_avg" in lines[0])
    )
    low, high = summary["after"]["eval_objective/rlhf_reward_95"]
    assert low < summary["after"]["eval_objective/rlhf_reward"] < high
    assert summary["before"]["eval_objective/kl"] == 0.0 and summary["after"]["eval_rows"] == 4
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    fresh = load_model("tiny", load_tokenizer("slots")).state_dict()  # no value head beside it
    assert loaded.state_dict().keys() == fresh.keys()
    assert not torch.equal(loaded.lm_head.weight, fresh["lm_head.weight"])


def test_claim_a_learned_reward_is_read_from_its_folder(tmp_path, model, tokenizer, write_jsonl):
    """Prompts from a file, scores from a saved reward model; another tokenizer is refused."""
    rows = write_jsonl("prompts.jsonl", [{"prompt": f"I am a chef in {c}."} for c in "ab" * 10])
    folder = str(tmp_path / "reward")
    saved = reward.with_head(model, tokenizer)
    torch.nn.init.normal_(saved.score.weight, generator=torch.Generator().manual_seed(0))
    engine.save(saved, tokenizer, folder, {})
    given = dict(data=rows, reward=folder, tokenizer="slots", max_steps=1)
    summary = ppo.run(config(output_dir=str(tmp_path / "a"), missing_eos_penalty=0.0, **given))
    found, prompts, _ = ppo.load_problem(config(**given, output_dir=str(tmp_path / "a")),
                                         tokenizer, model.device, 100)  # fmt: skip
    pair = (prompts[0].prompt, [4, 5, EOS])
    assert torch.equal(found([pair]), reward.scores(saved, [pair]))
    assert abs(summary["before"]["eval_objective/scores"]) > 1e-3
    trips = load_tokenizer("trips")
    strange = str(tmp_path / "strange")
    engine.save(reward.with_head(load_model("tiny", trips), trips), trips, strange, {})
    with pytest.raises(InputError, match=r"tokenizer .* are not the same"):
        ppo.run(config(output_dir=str(tmp_path / "b"), **(given | {"reward": strange})))


def test_claim_every_pass_has_every_response_once():
    given = config(num_ppo_epochs=3, num_mini_batches=4)
    shares = list(steps.mini_batches(10, given, torch.Generator().manual_seed(0)))
    assert [len(x) for x in shares] == [3, 3, 2, 2] * 3
    passes = [[i for x in shares[k : k + 4] for i in x] for k in (0, 4, 8)]
    assert [sorted(x) for x in passes] == [list(range(10))] * 3 and passes[0] != passes[1]


def test_claim_responses_to_one_prompt_stand_together(model, tokenizer):
    """The leave-one-out baseline compares what it should."""
    seen = respond(task(model, model, tokenizer, num_generations=4))
    table = [seen.examples[i : i + 4] for i in range(0, 64, 4)]
    assert all(len({tuple(e.prompt) for e in four}) == 1 for four in table)
    assert [four[0].row for four in table] == [e.row for e in PROMPTS]


def test_claim_masked_places_hold_nothing():
    """Tables of unequal widths are stacked with 0, and rewards beyond a response are 0."""
    one, two = torch.ones(1, 2), torch.ones(2, 3)
    mask = rollout.stack([one, two]).long()
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    logp = -mask.float()
    seen = Rollout([], logp, 2 * logp, mask, torch.tensor([5.0, 6.0, 7.0]), mask[:, 0].bool())
    assert seen.rewards(0.5)[0].tolist() == [-0.5, 4.5, 0.0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(beta=0.0), "beta must be positive and finite"),
        (dict(beta=float("nan")), "beta must be positive and finite"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1"),
        (dict(num_generations=0), "num_generations must be at least 1"),
        (dict(num_ppo_epochs=0), "num_ppo_epochs must be at least 1"),
        (dict(num_mini_batches=-1), "num_mini_batches must be at least 1"),
        (dict(cliprange=0.0), "cliprange must be positive"),
        (dict(cliprange_value=-1.0), "cliprange_value must be positive"),
        (dict(lam=1.5), "lam must lie in"),
        (dict(vf_coef=-0.1), "vf_coef must be finite and not negative"),
        (dict(missing_eos_penalty=float("inf")), "missing_eos_penalty must be finite"),
        (dict(algorithm="rloo", num_generations=1), "rloo compares responses"),
        (dict(data="rows.jsonl"), "true reward is known in the embedded worlds only"),
        (dict(eval_data="rows.jsonl"), "leave out --eval-data"),
    ],
)
def test_claim_settings_that_cannot_be_are_refused(change, sentence):
    with pytest.raises(InputError, match=sentence):
        config(**change)


def test_claim_no_room_for_a_prompt_is_refused(model):
    assert ppo.room(model, config(max_new_tokens=200)) == 57  # prompts of at most 56 tokens
    with pytest.raises(InputError, match="leaves no room for a prompt in 256 tokens"):
        ppo.room(model, config(max_new_tokens=256))


def test_claim_a_reference_with_another_tokenizer_is_refused(tmp_path):
    trips = load_tokenizer("trips")
    engine.save(load_model("tiny", trips), trips, str(tmp_path / "ref"), {})
    given = replace(config(), reference=str(tmp_path / "ref"), output_dir=str(tmp_path / "out"))
    with pytest.raises(InputError, match="tokenizer and the reference's are not the same: token"):
        ppo.run(given)
