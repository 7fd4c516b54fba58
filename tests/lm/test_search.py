"""Value-guided search and tree search on a tiny Pythia, against its likelihood and exact trees."""

import math
import random

import pytest
import torch

from qlearn.exact import search as exact
from qlearn.exact import soft
from qlearn.lm.cursor import Cursor, response_logps
from qlearn.lm.decode import Decoding, decode
from qlearn.lm.search import Guided, Node, implied_forecast
from qlearn.lm.tree import language_tree

BETA, PROMPTS = 0.5, ["POST: I am a nurse in Oslo.", "TITLE: Is this a fair offer?", "POST:"]


@pytest.fixture
def forecast(model, other, tokenizer):
    """What `model`'s own logits say a text is worth, `other` being the reference."""
    return implied_forecast(model, other, BETA, tokenizer.eos_token_id, len(tokenizer))


@pytest.mark.parametrize("k", [3, 8])
def test_claim_guided_search_is_likelihood_search_on_a_tiny_pythia(model, other, k):
    """F1 on every prefix of a language model's tree, and the same winner at every depth.

    `eq-guided-is-likelihood`.
    """
    tree = language_tree(model, other, [5, 6, 7], top_k=k, horizon=3, eos=0)
    reward = soft.reward_from_q(tree.tree, tuple(BETA * x for x in tree.logits), tree.log_ref, BETA)
    guided = exact.guided_scores(tree.tree, reward, tree.log_ref, BETA)
    likely = exact.likelihood_scores(tree.tree, tree.logp, BETA)
    start = BETA * torch.logsumexp(tree.logits[0][0], 0)
    for g, p in zip(guided, likely, strict=True):
        assert (g - (start + p)).abs().max() < 1e-8
    for depth in (1, 2, 3):
        winners = {exact.best_prefix(tree.tree, x, depth) for x in (guided, likely)}
        assert len(winners) == 1


def test_claim_worth_is_the_running_log_ratio(model, other, tokenizer, forecast):
    """W(s) − V(s₀) = β log π/π_ref of the text, finished (last) or not, from r and V apart."""
    prompt = tokenizer(PROMPTS[0]).input_ids
    texts = [[9], [9, 4, 17], [9, 4, 17, tokenizer.eos_token_id]]
    rows = [(prompt, text) for text in texts]
    ratio = response_logps(model, rows, 224) - response_logps(other, rows, 224)
    start = BETA * model(torch.tensor([prompt])).logits[0, -1].logsumexp(-1)
    found = forecast([(prompt, []), *rows])
    assert abs(found[0] - start) < 1e-4
    assert (found[1:] - start - BETA * ratio).abs().max() < 1e-4


@pytest.mark.parametrize("width", [1, 3])
def test_eq_13_guided_beams_are_likelihood_beams(model, other, tokenizer, forecast, width):
    """`eq-guided` on the reference with the policy's own r and V, against a beam on the policy."""
    how = dict(beams=width, max_new_tokens=3)
    likely = decode(model, tokenizer, PROMPTS[1:], Decoding(decoder="beam", **how))
    guided = decode(
        other, tokenizer, PROMPTS[1:],
        Decoding(decoder="guided", candidates=224, beta=BETA, **how), forecast=forecast,
    )  # fmt: skip
    assert [d.tokens for d in guided] == [d.tokens for d in likely]
    assert all(abs(a.score - b.score) < 1e-3 for a, b in zip(guided, likely, strict=True))


def test_claim_a_wrong_value_changes_what_guided_search_finds(model, other, tokenizer, forecast):
    how = Decoding(decoder="guided", beams=3, max_new_tokens=4, candidates=20, beta=BETA)

    def without_value(rows):
        return torch.zeros(len(rows))

    right, wrong = (
        decode(other, tokenizer, PROMPTS, how, forecast=f) for f in (forecast, without_value)
    )
    assert [d.tokens for d in right] != [d.tokens for d in wrong]
    # with nothing to earn, Eq. 12 is a beam on the reference
    plain = decode(other, tokenizer, PROMPTS, Decoding(decoder="beam", beams=3, max_new_tokens=4))
    assert [d.tokens for d in wrong] == [d.tokens for d in plain]


def test_claim_guided_rows_survive_being_reordered(other, forecast):
    """After `keep` and `append` every row's table is that of a fresh start at its text."""
    guided = Guided(other, [[5, 6], [7, 8]], forecast, beta=BETA, candidates=6, n_tokens=224)
    guided.keep(torch.tensor([1, 0, 1]))
    tokens = guided.logp.argmax(-1)
    guided.append(tokens)
    for i, start in enumerate(([7, 8], [5, 6], [7, 8])):
        fresh = Cursor(other, [[*start, int(tokens[i])]], 224).logp[0]
        own = guided.logp[i].isfinite()
        assert set(own.nonzero()[:, 0].tolist()) == set(fresh.topk(6).indices.tolist())
        base, ahead = (
            forecast([(start, [int(tokens[i]), *extra])])
            for extra in ((), (int(own.nonzero()[0]),))
        )
        a = int(own.nonzero()[0])
        assert abs(guided.logp[i, a] - fresh[a] - (ahead - base) / BETA) < 1e-4


def exact_greedy(tree, logp):
    """(tokens, Σ log π) of the greedy response of an exact policy on a language tree."""
    tokens, total, s = [], 0.0, 0
    for t in range(tree.tree.horizon):
        a = int(logp[t][s].argmax())
        tokens.append(int(tree.token[t][s, a]))
        total += logp[t][s, a].item()
        s = int(tree.tree.child[t][s, a])
        if s < 0:
            break
    return tokens, total


def earned_only(tree):
    """W without any value: the rewards of a text's tokens so far, on a language tree's reward."""

    def of(reward):
        def forecast(rows):
            worth = []
            for _, response in rows:
                total, s = 0.0, 0
                for t, token in enumerate(response):
                    a = tree.token[t][s].tolist().index(token)
                    total += reward[t][s, a].item()
                    s = int(tree.tree.child[t][s, a])
                worth.append(total)
            return torch.tensor(worth, dtype=torch.float64)

        return forecast

    return of


def test_claim_enough_simulations_give_the_exact_soft_optimum(model, other, tokenizer):
    """A forecast without any value at all: the whole tree is looked at, and backed up softly."""
    prompt = tokenizer(PROMPTS[2]).input_ids
    differ = 0
    for seed in range(3):
        tree = language_tree(other, other, prompt, top_k=4, horizon=4, eos=0)
        draws = torch.Generator().manual_seed(seed)
        reward = tuple(
            torch.randn(x.shape, generator=draws, dtype=torch.float64) for x in tree.log_ref
        )
        solved = soft.soft_backup(tree.tree, reward, tree.log_ref, BETA)
        tokens, total = exact_greedy(tree, solved.logp)
        found = {}
        for simulations in (1, 100):
            how = Decoding(
                decoder="mcts", max_new_tokens=4, candidates=4, simulations=simulations, beta=BETA
            )
            (found[simulations],) = decode(
                other, tokenizer, PROMPTS[2:], how, forecast=earned_only(tree)(reward)
            )
        assert found[100].tokens == tokens and abs(found[100].score - total) < 1e-5
        differ += abs(found[1].score - total) > 1e-3
    assert differ


def test_claim_search_adds_nothing_to_a_consistent_value(model, other, tokenizer):
    """With W of the policy's own logits each simulation leaves π̂ alone: greedy on π."""
    prompt = tokenizer(PROMPTS[2]).input_ids
    tree = language_tree(model, other, prompt, top_k=5, horizon=3, eos=0)
    reward = soft.reward_from_q(tree.tree, tuple(BETA * x for x in tree.logits), tree.log_ref, BETA)
    value = soft.soft_backup(tree.tree, reward, tree.log_ref, BETA).value
    earned = earned_only(tree)(reward)

    def forecast(rows):
        ahead = []
        for _, response in rows:
            s, v = 0, value[0][0].item()
            for t, token in enumerate(response):
                s = int(tree.tree.child[t][s, tree.token[t][s].tolist().index(token)])
                v = 0.0 if s < 0 else value[t + 1][s].item()
            ahead.append(v)
        return earned(rows) + torch.tensor(ahead, dtype=torch.float64)

    tokens, total = exact_greedy(tree, tree.logp)
    for simulations in (1, 30):
        how = Decoding(
            decoder="mcts", max_new_tokens=3, candidates=5, simulations=simulations, beta=BETA
        )
        (found,) = decode(other, tokenizer, PROMPTS[2:], how, forecast=forecast)
        assert found.tokens == tokens and abs(found.score - total) < 1e-5
    assert not math.isnan(total)


def test_claim_tree_search_answers_prompts_together_as_alone(other, tokenizer, forecast):
    how = Decoding(decoder="mcts", max_new_tokens=3, candidates=3, simulations=4, beta=BETA)
    together = decode(other, tokenizer, PROMPTS, how, forecast=forecast)
    for prompt, found in zip(PROMPTS, together, strict=True):
        (alone,) = decode(other, tokenizer, [prompt], how, forecast=forecast)
        assert alone.tokens == found.tokens and abs(alone.score - found.score) < 1e-4


def test_claim_puct_selects_the_open_candidate_of_the_highest_score():
    """π̂ + c · π_ref √(1 + Σ n)/(1 + n), against a table of it, with π̂ from a softmax."""
    draws, chosen = random.Random(0), set()
    for _ in range(400):
        k = draws.randrange(2, 6)
        log_ref = torch.tensor([draws.gauss(0, 1.5) for _ in range(k)]).double().log_softmax(0)
        worth = torch.tensor([draws.gauss(0, 1) for _ in range(k)]).double()
        done = [draws.random() < 0.2 for _ in range(k)]
        done[draws.randrange(k)] = False
        node = Node(([5], []), list(range(k)), log_ref.tolist(), worth.tolist(), done)
        node.visits = [draws.randrange(6) for _ in range(k)]
        visits = torch.tensor(node.visits).double()
        beta, c = draws.choice([0.3, 1.0]), draws.choice([0.0, 0.5, 2.0])
        score = (log_ref + worth / beta).softmax(0)
        score += c * log_ref.exp() * (1 + visits.sum()).sqrt() / (1 + visits)
        score[torch.tensor(done)] = -1.0
        assert node.select(beta, c) == int(score.argmax())
        chosen.add((c, int(score.argmax()) == int((log_ref + worth / beta).argmax())))
    assert len(chosen) == 6  # the best candidate and another, at each exploration
    equal = Node(([5], []), [7, 8], [math.log(0.5)] * 2, [0.0, 0.0], [False, False])
    assert equal.select(1.0, 1.0) == 0  # the likelier one where two are equal


def test_claim_a_nodes_value_and_policy_are_the_soft_bellman_equation():
    """β log Σ π_ref exp(W/β) by hand; and where exp would overflow, by its limit."""
    node = Node(([5], []), [7, 8], [math.log(0.25), math.log(0.75)], [1.0, 2.0], [False, False])
    value = 0.5 * math.log(0.25 * math.exp(2) + 0.75 * math.exp(4))
    assert node.value(0.5) == pytest.approx(value, abs=1e-12)
    expected = [math.log(p) + (w - value) / 0.5 for p, w in ((0.25, 1.0), (0.75, 2.0))]
    assert node.logp(0.5) == pytest.approx(expected, abs=1e-12)
    steep = Node(([5], []), [7, 8], [math.log(0.5)] * 2, [-1e4, 1e4], [False, False])
    assert steep.value(1.0) == pytest.approx(1e4 + math.log(0.5))


def test_claim_each_simulation_looks_at_one_text(other, tokenizer):
    """In the order of PUCT without exploration: the likeliest text that is not fully known."""
    (prompt,) = (tokenizer(p).input_ids for p in PROMPTS[2:])

    def best(text):
        return other(torch.tensor([prompt + text])).logits[0, -1].topk(2).indices.tolist()

    a, _ = best([])
    aa, ab = best([a])
    once = [[], [a], [a, aa]]  # before each token the text that it begins, and no other
    expected = {1: once, 2: [*once, [a, ab]]}
    for simulations in (1, 2):
        looked = []

        def forecast(rows, looked=looked):
            looked.append(rows[0][1][:-1])
            return torch.zeros(len(rows))

        how = Decoding(decoder="mcts", max_new_tokens=3, candidates=2, exploration=0.0,
                       simulations=simulations, beta=BETA)  # fmt: skip
        (found,) = decode(other, tokenizer, PROMPTS[2:], how, forecast=forecast)
        assert looked == expected[simulations] and found.tokens[:2] == [a, aa]


def test_claim_worth_is_of_the_tokenizers_tokens_alone(model, other, tokenizer):
    """Rows of a table that no token names take no part: W from full logits, cut by hand."""
    prompt, n = tokenizer(PROMPTS[0]).input_ids, 100
    forecast = implied_forecast(model, other, BETA, 0, n, batch_size=2)
    rows = [(prompt, text) for text in ([], [9], [9, 4], [9, 4, 0])]
    for (_, text), worth in zip(rows, forecast(rows).tolist(), strict=True):
        ids = torch.tensor([prompt + text])
        own, ref = (m(ids).logits[0, len(prompt) - 1 :, :n].double() for m in (model, other))
        expected = 0.0
        value = [BETA * x.logsumexp(0).item() for x in own]
        if text[-1:] == [0]:
            value[-1] = 0.0
        for t, a in enumerate(text):
            reward = BETA * (own[t, a] - ref[t].log_softmax(0)[a]).item() - value[t + 1]
            expected += reward
        assert abs(worth - expected - value[-1]) < 1e-4
