"""Decoding: against transformers' `generate`, against enumeration, and against plain argmax."""

import itertools
import math

import pytest
import torch

from qlearn.errors import InputError
from qlearn.lm.cursor import Cursor, Mixture, response_logps
from qlearn.lm.decode import Decoding, beam, decode, draw, pick, sample
from qlearn.lm.encoding import begin_ids
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
    from transformers import GPTNeoXForCausalLM

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
