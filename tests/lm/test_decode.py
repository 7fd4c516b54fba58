"""Decoding: against transformers' `generate`, against enumeration, and against plain argmax."""

import itertools
import math

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from qlearn.errors import InputError
from qlearn.lm.cursor import Cursor, Mixture, response_logps
from qlearn.lm.decode import Decoding, _batches, beam, decode, draw, pick, sample
from qlearn.lm.encoding import begin_ids, encode_prompts
from qlearn.lm.models import SHAPES, config_of, load_model
from qlearn.lm.worlds import SlotWorld
from tests.families import FAMILIES, tiny_llama

PROMPTS = [post.prompt for post in SlotWorld().posts(6, "decode")] + ["POST:"]


def test_claim_padding_on_the_left_changes_no_greedy_token(model, tokenizer):
    """Trap 6: a batch of unequal prompts decodes as each prompt alone, by plain argmax."""
    texts = sample(model, tokenizer, PROMPTS, max_new_tokens=8, seed=0, greedy=True)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer(prompt).input_ids
        start = len(ids)
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 0:
                break
        assert text.split() == tokenizer.decode(ids[start:], skip_special_tokens=True).split()


def test_claim_same_seed_same_text(model, tokenizer):
    """And sampling leaves the global random state alone."""
    before = torch.get_rng_state()
    one, two, three = (
        sample(model, tokenizer, PROMPTS, max_new_tokens=8, seed=s) for s in (1, 1, 2)
    )
    assert one == two != three and torch.equal(before, torch.get_rng_state())


def test_claim_rows_beyond_the_tokenizer_are_never_drawn(tokenizer, tmp_path):
    """Pythia's tables have rows that no token names; an untrained model would draw them."""
    config = config_of(SHAPES["tiny"], tokenizer)
    config.vocab_size = 4 * len(tokenizer)
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), tokenizer)
    texts = sample(model, tokenizer, PROMPTS, max_new_tokens=8, seed=0)
    words = set(SlotWorld().vocabulary())
    assert all(len(text.split()) >= 4 for text in texts)
    assert tokenizer.unk_token_id not in tokenizer(" ".join(texts)).input_ids and words


def end_of(model, tokenizer):
    """A token that the model often writes, to play the end of text."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)  # less flat, so that ends come at all lengths
    rows = [d.tokens for d in decode(model, tokenizer, PROMPTS, Decoding(max_new_tokens=30))]
    tokens = list(itertools.chain(*rows))
    return max(set(tokens), key=tokens.count)


def generate(model, tokenizer, prompts, eos, **how):
    """Token lists by transformers, cut after the end of text."""
    inputs = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left",
        return_token_type_ids=False,
    )  # fmt: skip
    with torch.no_grad():
        out = model.generate(
            **inputs, **how, do_sample=False, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id
        )
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def encode(tokenizer):
    return tokenizer(PROMPTS, add_special_tokens=False).input_ids


def test_reference_greedy_is_generates(model, tokenizer):
    eos = end_of(model, tokenizer)
    cursor = Cursor(model, encode(tokenizer), len(tokenizer))
    how = Decoding(decoder="greedy", max_new_tokens=12)
    found = [tokens for tokens, _ in draw(cursor, torch.zeros(len(PROMPTS), 12), how, eos)]
    assert found == generate(model, tokenizer, PROMPTS, eos, max_new_tokens=12)


@pytest.mark.parametrize(
    ("width", "penalty"), [(1, 0.0), (2, 0.0), (2, 1.0), (5, 0.5), (20, 0.0), (20, 1.0)]
)
def test_reference_beam_is_generates(model, tokenizer, width, penalty):
    """Several prompts at once, ends at many lengths; one beam without penalty is greedy."""
    eos = end_of(model, tokenizer)
    how = Decoding(decoder="beam", beams=width, length_penalty=penalty, max_new_tokens=12)
    ids = encode(tokenizer)
    answers = beam(Cursor(model, ids, len(tokenizer)), len(ids), how, eos)
    found = [tokens for tokens, _ in answers]
    several = dict(num_beams=width, length_penalty=penalty, early_stopping="never")
    assert found == generate(
        model, tokenizer, PROMPTS, eos, max_new_tokens=12, **(several if width > 1 else {})
    )
    assert any(eos in tokens for tokens in found) or penalty
    logps = response_logps(model, list(zip(ids, found, strict=True)), len(tokenizer))
    for (tokens, score), logp in zip(answers, logps.tolist(), strict=True):
        assert abs(score - logp / len(tokens) ** penalty) < 1e-4


def test_claim_a_beam_of_all_prefixes_finds_the_mode(model, tokenizer):
    """F4 on a language model: all 224 prefixes of one token kept, against all responses of two."""
    prompt = encode(tokenizer)[0]
    eos, n = end_of(model, tokenizer), len(tokenizer)
    first = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    rows = torch.tensor([[*prompt, a] for a in range(n)])
    total = first[:, None] + model(rows).logits[:, -1].log_softmax(-1)
    total[eos] = -math.inf
    total[eos, 0] = first[eos]
    how = Decoding(decoder="beam", beams=n, max_new_tokens=2, batch_size=n)
    ((tokens, score),) = beam(Cursor(model, [prompt], n), 1, how, eos)
    a, b = divmod(int(total.argmax()), n)
    assert tokens == ([a] if a == eos else [a, b]) and abs(score - total.max().item()) < 1e-4


def test_claim_wider_beams_find_likelier_responses_and_penalties_longer_ones(model, tokenizer):
    eos, ids = end_of(model, tokenizer), encode(tokenizer)
    found = {}
    for width, penalty in ((1, 0.0), (20, 0.0), (20, 1.0)):
        how = Decoding(decoder="beam", beams=width, length_penalty=penalty, max_new_tokens=12)
        found[width, penalty] = beam(Cursor(model, ids, len(tokenizer)), len(ids), how, eos)
    mean = {
        key: (sum(s for _, s in x) / len(ids), sum(len(y) for y, _ in x) / len(ids))
        for key, x in found.items()
    }
    assert mean[20, 0.0][0] > mean[1, 0.0][0] and mean[20, 1.0][1] > mean[20, 0.0][1]


def test_claim_sampling_follows_the_distribution():
    """Evenly spread noise gives every token its share, at a temperature and among the best."""
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0)).expand(20_000, -1)
    noise = (torch.arange(20_000) + 0.5) / 20_000
    for scale, top_k in ((1.0, None), (2.0, None), (1.0, 5)):
        share = pick(logits * scale, noise, top_k).bincount(minlength=30) / 20_000
        kept = logits[0] * scale
        if top_k:
            kept = kept.masked_fill(kept < kept.topk(top_k).values[-1], -math.inf)
        assert (share - kept.softmax(-1)).abs().max() < 2e-4
    never = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]]).expand(3, -1)
    assert pick(never, torch.tensor([0.0, 0.5, 1 - 2**-24])).tolist() == [0, 2, 2]


def test_claim_a_text_depends_on_its_seed_and_place_only(model, tokenizer):
    """Batches, order of lengths and repeated prompts change nothing but which rows share a pass."""
    prompts = [*PROMPTS, *PROMPTS]
    one, two = (
        decode(model, tokenizer, prompts, Decoding(max_new_tokens=8, batch_size=size), seed=3)
        for size in (3, 100)
    )
    assert [d.tokens for d in one] == [d.tokens for d in two]
    assert [d.tokens for d in one[:7]] != [d.tokens for d in one[7:]]


@pytest.mark.parametrize("decoder", ["sample", "greedy"])
def test_claim_scores_are_log_probabilities(model, tokenizer, decoder):
    found = decode(model, tokenizer, PROMPTS, Decoding(decoder=decoder, max_new_tokens=8), seed=1)
    for d in found:
        logits = model(torch.tensor([d.prompt + d.tokens])).logits[0].log_softmax(-1)
        steps = range(len(d.prompt) - 1, len(d.prompt) + len(d.tokens) - 1)
        assert abs(d.score - sum(logits[t, (d.prompt + d.tokens)[t + 1]] for t in steps)) < 1e-4
        assert d.ended == (d.tokens[-1] == tokenizer.eos_token_id)
        assert d.text.split() == tokenizer.decode(d.tokens, skip_special_tokens=True).split()


def test_claim_a_mixture_decodes_like_one_model(model, other, tokenizer):
    """Greedy on the product of two policies, against plain argmax; and its scores."""
    both = Mixture((model, other), lambda a, b: (a + b).log_softmax(-1))
    found = decode(both, tokenizer, PROMPTS, Decoding(decoder="greedy", max_new_tokens=5))
    for d in found:
        ids = list(d.prompt)
        for token in d.tokens:
            x = torch.tensor([ids])
            mixed = (model(x).logits + other(x).logits)[0, -1]
            assert int(mixed.argmax()) == token
            ids.append(token)
    logps = response_logps(both, [(d.prompt, d.tokens) for d in found], len(tokenizer))
    assert all(abs(d.score - x) < 1e-4 for d, x in zip(found, logps.tolist(), strict=True))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(decoder="bean"), "no decoder 'bean'; choose one of sample, greedy, beam"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, not 0"),
        (dict(beams=5), "beams is set to 5, but the decoder sample does not read it"),
        (dict(decoder="beam", temperature=0.5), "does not read it; leave it out or choose sample"),
        (dict(decoder="beam", beams=0), "beams must be at least 1"),
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(top_k=0), "top_k must be at least 1"),
        (dict(decoder="beam", length_penalty=-1.0), "length_penalty must not be negative"),
    ],
)
def test_claim_impossible_settings_are_one_sentence(settings, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        Decoding(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "prompts", "sentence"),
    [
        (dict(decoder="beam", beams=225), PROMPTS, "beams is 225, more than the vocabulary's 224"),
        (dict(decoder="guided"), PROMPTS, "guided needs a forecast"),
        (dict(max_new_tokens=300), PROMPTS, "exceed the model's context of 256"),
        (dict(), ["POST:", ""], "A prompt has no token"),
    ],
)
def test_claim_impossible_requests_are_one_sentence(model, tokenizer, settings, prompts, sentence):
    with pytest.raises(InputError, match=sentence):
        decode(model, tokenizer, prompts, Decoding(**settings))


def test_claim_no_prompts_give_no_responses(model, tokenizer):
    assert sample(model, tokenizer, [], max_new_tokens=3, seed=0) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_bug_generated_text_keeps_every_ordinary_word(family):
    """The padding that was once made up was "!": it vanished from all that a model wrote."""
    tokenizer = FAMILIES[family]()
    model = tiny_llama(tokenizer)
    how = Decoding(max_new_tokens=24)
    (decoded,) = decode(model, tokenizer, ["Is it late?"], how, seed=1)
    special = set(tokenizer.all_special_ids)
    assert decoded.prompt[: len(begin_ids(tokenizer))] == begin_ids(tokenizer)
    words = [token for token in decoded.tokens if token not in special]
    assert decoded.text.strip() == tokenizer.decode(words).strip()
    mark = tokenizer("!", add_special_tokens=False).input_ids
    assert "!" in tokenizer.decode(mark, skip_special_tokens=True)


class Table:
    """A cursor whose log π are given: {tokens so far: probabilities}, of equal prompts."""

    only_falls = True

    def __init__(self, table, n=1):
        self.table, self.texts, self.appended = table, [()] * n, 0
        self.read()

    def read(self):
        self.logp = torch.tensor([self.table[text] for text in self.texts]).log()

    def keep(self, rows):
        self.texts = [self.texts[i] for i in rows.tolist()]
        self.logp = self.logp[rows]

    def append(self, tokens):
        self.appended += 1
        self.texts = [(*text, a) for text, a in zip(self.texts, tokens.tolist(), strict=True)]
        self.read()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_claim_a_temperature_divides_log_probabilities_and_no_score(temperature):
    """Even noise gives each token its share of p^(1/T); the score is log p all the same."""
    p, n = [0.1, 0.2, 0.3, 0.4], 4000
    how = Decoding(temperature=temperature, max_new_tokens=1)
    noise = ((torch.arange(n) + 0.5) / n)[:, None]
    answers = draw(Table({(): p}, n), noise, how, eos=0)
    raised = [x ** (1 / temperature) for x in p]
    for token, share in enumerate(x / sum(raised) for x in raised):
        scores = [score for tokens, score in answers if tokens == [token]]
        assert abs(len(scores) / n - share) < 1e-3
        assert all(abs(score - math.log(p[token])) < 1e-6 for score in scores)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_claim_no_pass_is_spent_on_a_text_that_is_full(steps):
    """T tokens need T − 1 passes after the prompt's; a text that ends sooner needs fewer."""
    table = {(1,) * t: [0.1, 0.9] for t in range(3)} | {(1, 1, 1): [0.9, 0.1]}
    for decoder in ("greedy", "sample"):
        cursor, how = Table(table), Decoding(decoder=decoder, max_new_tokens=steps)
        ((tokens, score),) = draw(cursor, torch.full((1, steps), 0.5), how, eos=0)
        assert tokens == [1] * steps and cursor.appended == steps - 1
        assert abs(score - steps * math.log(0.9)) < 1e-6
    cursor, how = Table(table), Decoding(decoder="greedy", max_new_tokens=9)
    ((tokens, _),) = draw(cursor, torch.zeros(1, 9), how, eos=0)
    assert tokens == [1, 1, 1, 0] and cursor.appended == 3


def test_claim_the_first_of_two_equal_responses_stays():
    """Exactly equal totals: the one that ended sooner, and no pass for what can only tie."""
    cursor = Table({(): [0.5, 0.5], (1,): [1.0, 0.0], (1, 0): [1.0, 0.0]})
    how = Decoding(decoder="beam", beams=1, max_new_tokens=3)
    ((tokens, score),) = beam(cursor, 1, how, eos=0)
    assert tokens == [0] and score == pytest.approx(math.log(0.5)) and cursor.appended == 0
    # and where it is looked at all the same: the second text is likelier at first, and then ties
    table = {(): [0.25, 0.5, 0.25], (1,): [0.5, 0.25, 0.25]}
    cursor = Table(table | {(1, a): [1.0, 0.0, 0.0] for a in range(3)})
    ((tokens, score),) = beam(cursor, 1, how, eos=0)
    assert tokens == [1, 0] and score == pytest.approx(math.log(0.25))
    how = Decoding(decoder="beam", beams=2, max_new_tokens=3)
    cursor = Table(table | {(a,): [0.5, 0.25, 0.25] for a in (1, 2)}
                   | {(a, b): [1.0, 0.0, 0.0] for a in range(3) for b in range(3)})  # fmt: skip
    ((tokens, score),) = beam(cursor, 1, how, eos=0)
    assert tokens == [0] and score == pytest.approx(math.log(0.25))


@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_claim_no_beam_goes_on_behind_an_end(width, penalty):
    """Three tokens, as many beams: at first there are fewer open texts than places."""
    draws = torch.Generator().manual_seed(width)
    texts = [t for n in range(3) for t in itertools.product(range(3), repeat=n)]
    table = {t: torch.rand(3, generator=draws).softmax(0).tolist() for t in texts}
    how = Decoding(decoder="beam", beams=width, length_penalty=penalty, max_new_tokens=3)
    ((tokens, score),) = beam(Table(table), 1, how, eos=0)
    assert 0 not in tokens[:-1]
    total = sum(math.log(table[tuple(tokens[:t])][a]) for t, a in enumerate(tokens))
    assert abs(score - total / len(tokens) ** penalty) < 1e-5
    if width == 3 and penalty == 0:  # wide enough for every likely beginning
        ends = [t for n in range(1, 4) for t in itertools.product(range(3), repeat=n)
                if 0 not in t[:-1] and (t[-1] == 0 or n == 3)]  # fmt: skip
        totals = [sum(math.log(table[t[:k]][a]) for k, a in enumerate(t)) for t in ends]
        assert abs(score - max(totals)) < 1e-5


def test_claim_the_highest_noise_draws_a_token_that_can_be_drawn():
    """Whatever a cumulated softmax rounds to at its end, above 1 or below; so in half precision."""
    highest = torch.tensor([1 - 2**-24])
    for n in range(2, 400):
        logits = torch.zeros(1, n)
        logits[0, -1] = -math.inf
        assert pick(logits, highest).item() == n - 2
    assert pick(torch.zeros(1, 4, dtype=torch.float16), highest).item() == 3


def test_claim_more_best_tokens_than_there_are_is_all_of_them():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(60, -1)
    noise = (torch.arange(60) + 0.5) / 60
    for top_k in (3, 4):
        assert pick(logits, noise, top_k).tolist() == pick(logits, noise).tolist()
    assert pick(logits, noise, 2).unique().tolist() == [1, 2]


def test_claim_batches_are_of_like_length_and_hold_so_many_texts():
    """Six prompts by length, then by their ids; each takes a place for each of its beams."""
    ids = [[3, 3, 3], [2], [1, 1], [1], [4, 4, 4], [9]]
    order = [3, 1, 5, 2, 0, 4]
    for batch_size, beams, size in ((4, 1, 4), (4, 2, 2), (5, 2, 2), (2, 3, 1), (6, 1, 6)):
        how = Decoding(decoder="beam", beams=beams, batch_size=batch_size)
        parts = [order[i : i + size] for i in range(0, 6, size)]
        assert list(_batches(ids, how)) == parts


def test_claim_the_short_form_passes_its_settings_on(model, tokenizer):
    """A temperature is read by sampling; greedy has none, so that one is no fault there."""
    how = Decoding(temperature=0.5, max_new_tokens=6)
    cold = [d.text for d in decode(model, tokenizer, PROMPTS, how, seed=4)]
    settings = dict(max_new_tokens=6, seed=4)
    assert sample(model, tokenizer, PROMPTS, temperature=0.5, **settings) == cold
    assert sample(model, tokenizer, PROMPTS, **settings) != cold
    greedy = sample(model, tokenizer, PROMPTS, greedy=True, temperature=0.5, **settings)
    assert greedy == sample(model, tokenizer, PROMPTS, greedy=True, **settings)


def test_claim_the_end_of_text_is_no_part_of_a_text(model, tokenizer):
    """A model that is sure: first of a word, then of the end."""
    word = 9
    with torch.no_grad():
        model.base_model.final_layer_norm.weight.zero_()
        model.base_model.final_layer_norm.bias.fill_(1.0)
        model.get_output_embeddings().weight.zero_()
        model.get_output_embeddings().weight[word] = 1.0
    how = Decoding(decoder="greedy", max_new_tokens=2)
    (found,) = decode(model, tokenizer, ["POST:"], how)
    name = tokenizer.convert_ids_to_tokens(word)
    assert found.tokens == [word] * 2 and found.text == f" {name} {name}" and not found.ended
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.eos_token_id] = 2.0
    (found,) = decode(model, tokenizer, ["POST:"], how)
    assert (found.text, found.tokens, found.ended) == ("", [tokenizer.eos_token_id], True)
    how = Decoding(decoder="greedy", max_new_tokens=1)
    assert decode(model, tokenizer, ["POST:"], how)[0].ended  # with the last token that it may have


def test_claim_the_longest_prompt_and_the_least_context_decide(model, tokenizer):
    """Prompt and response together, of all prompts and of all models of a mixture."""
    config = config_of(SHAPES["tiny"], tokenizer)
    config.max_position_embeddings = 64
    small = GPTNeoXForCausalLM(config).eval()
    (n,) = map(len, encode_prompts(tokenizer, PROMPTS[:1]))
    fits, over = (Decoding(max_new_tokens=64 - n + more) for more in (0, 1))
    both = Mixture((model, small), lambda a, b: a)
    for prompts in (["POST:", PROMPTS[0]], [PROMPTS[0], "POST:"]):
        sentence = f"A prompt of {n} tokens and max_new_tokens {65 - n} exceed .* context of 64"
        for policy in (small, both, Mixture((small, model), lambda a, b: a)):
            with pytest.raises(InputError, match=sentence):
                decode(policy, tokenizer, prompts, over)
        decode(model, tokenizer, prompts, over)
    assert len(decode(both, tokenizer, PROMPTS[:1], fits)) == 1


def test_claim_scores_of_whole_rows_are_independent_of_the_batch(model, other):
    """`response_logps` in parts of two, against log-softmax of each row alone, of a mixture too."""
    draws = torch.Generator().manual_seed(0)
    rows = [([5, 6, 7][: 1 + i % 3], torch.randint(200, (1 + i,), generator=draws).tolist())
            for i in range(5)]  # fmt: skip
    half = Mixture((model, other), lambda a, b: ((a + b) / 2).log_softmax(-1))

    def expected(prompt, response):
        ids = torch.tensor([prompt + response])
        logps = [m(ids).logits[0, :, :200].log_softmax(-1) for m in (model, other)]
        at = torch.arange(len(response)) + len(prompt) - 1
        tables = (logps[0], (sum(logps) / 2).log_softmax(-1))
        return [table[at, response].sum().item() for table in tables]

    wanted = torch.tensor([expected(*row) for row in rows])
    for batch_size in (1, 2, 128):
        for policy, column in ((model, 0), (half, 1)):
            logps = response_logps(policy, rows, 200, batch_size=batch_size)
            assert torch.allclose(logps, wanted[:, column], atol=1e-4)


def test_claim_without_settings_texts_are_drawn_from_the_policy_itself(model, tokenizer):
    """At temperature 1 from all tokens, up to 64 of them; a beam is of one text, unpunished."""
    settings = dict(temperature=1.0, top_k=len(tokenizer), max_new_tokens=64)
    plain, said = (decode(model, tokenizer, PROMPTS, how, seed=2)
                   for how in (Decoding(), Decoding(**settings)))  # fmt: skip
    assert [d.tokens for d in plain] == [d.tokens for d in said]
    assert {len(d.tokens) for d in plain if not d.ended} == {64}
    one = decode(model, tokenizer, PROMPTS, Decoding(decoder="greedy"))
    two = decode(model, tokenizer, PROMPTS, Decoding(decoder="beam"))
    assert [d.tokens for d in one] == [d.tokens for d in two]
    assert all(abs(a.score - b.score) < 1e-3 for a, b in zip(one, two, strict=True))


def test_claim_a_cursor_is_float32_behind_a_body_of_half_precision(model):
    """log π of a bfloat16 model: its probabilities sum to 1, as bfloat16's own would not."""
    logp = Cursor(model.bfloat16(), [[5, 6, 7]], 200).logp
    assert logp.dtype == torch.float32 and logp.shape == (1, 200)
    assert abs(logp.exp().sum() - 1) < 1e-5


@pytest.mark.parametrize("text", [" late", "late", " late \n"])
def test_claim_a_text_keeps_the_spaces_that_its_tokens_bring(text, monkeypatch):
    tokenizer = FAMILIES["gpt2"]()
    tokens = tokenizer(text).input_ids
    monkeypatch.setattr("qlearn.lm.decode.draw", lambda *_: [(tokens, 0.0)])
    (found,) = decode(tiny_llama(tokenizer), tokenizer, ["Is it"], Decoding(max_new_tokens=8))
    assert found.text == text and found.tokens == tokens
