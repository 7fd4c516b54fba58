"""From a policy to responses: sampling, greedy, beam, value-guided search, tree search.

One calling convention: `decode(policy, tokenizer, prompts, Decoding(...))`. A policy is a model or
a `Mixture` of models. `sample` is the short form that training uses.

  sample    each token drawn from π, at a temperature, perhaps from its `top_k` best only
  greedy    each token the likeliest
  beam      the response with the highest Σ log π / length^length_penalty that a beam finds
  guided    a beam on Σ [r + β log π_ref] + V instead (Eq. 12), r and V told by a forecast
  mcts      each token the best after a tree search from its state on (`qlearn.lm.search.mcts`)
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qlearn.errors import InputError
from qlearn.lm.cursor import Cursor, Policy, parts
from qlearn.lm.encoding import encode_prompts
from qlearn.lm.search import Forecast, Guided, mcts
from qlearn.options import option

# decoder: the settings that it reads beside max_new_tokens and batch_size
SETTINGS = {
    "sample": {"temperature", "top_k"},
    "greedy": set(),
    "beam": {"beams", "length_penalty"},
    "guided": {"beams", "length_penalty", "candidates", "beta"},
    "mcts": {"candidates", "simulations", "exploration", "beta"},
}


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How to choose a response.

    Raises: InputError for an unknown decoder, a number out of range, or a setting that the chosen
    decoder would ignore (beams with sampling, say).
    """

    decoder: Literal["sample", "greedy", "beam", "guided", "mcts"] = option(
        "sample", "how each response is chosen"
    )
    max_new_tokens: int = option(64, "a response that has not ended by then stands as it is")
    temperature: float = option(1.0, "sample: draw from softmax(log π / temperature)")
    top_k: int | None = option(None, "sample: draw among this many best tokens; default: all")
    beams: int = option(1, "beam, guided: how many unfinished texts are kept a prompt")
    length_penalty: float = option(
        0.0, "beam, guided: responses compete by total / length^length_penalty"
    )
    candidates: int = option(8, "guided, mcts: how many best tokens of the policy are looked at")
    simulations: int = option(32, "mcts: texts looked at before each token")
    exploration: float = option(1.0, "mcts: PUCT's constant")
    beta: float = option(0.1, "guided, mcts: the price of a nat of distance from the policy")
    batch_size: int = option(128, "how many texts go through a model at once")

    def __post_init__(self):
        if self.decoder not in SETTINGS:
            raise InputError(
                f"There is no decoder {self.decoder!r}; choose one of {', '.join(SETTINGS)}."
            )
        for name in ("max_new_tokens", "beams", "candidates", "simulations", "batch_size", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}.")
        for name in ("temperature", "beta"):
            value = getattr(self, name)  # None where a subclass finds it out later
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} must be positive and finite, not {value}.")
        for name in ("length_penalty", "exploration"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} must not be negative, not {getattr(self, name)}.")
        for f in fields(Decoding):
            readers = [decoder for decoder, names in SETTINGS.items() if f.name in names]
            unset = (f.default, None)
            if readers and self.decoder not in readers and getattr(self, f.name) not in unset:
                raise InputError(
                    f"{f.name} is set to {getattr(self, f.name)}, but the decoder {self.decoder} "
                    f"does not read it; leave it out or choose {' or '.join(readers)}."
                )


class Decoded(NamedTuple):
    """A response: its text, prompt and tokens (end of text included if `ended`), and its score.

    The score is what the decoder compares: Σ log π in nats for sample and greedy, divided by
    length^length_penalty for beam; (Σ [r + β log π_ref] + V − V(s₀))/β for guided; Σ log π̂ of the
    searched policy for mcts.
    """

    text: str
    prompt: list[int]
    tokens: list[int]
    score: float
    ended: bool


def decode(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    how: Decoding,
    *,
    seed: int = 0,
    forecast: Forecast | None = None,
) -> list[Decoded]:
    """One response a prompt, in their order. guided and mcts need a `forecast`; see `Forecast`.

    Only sampling is random: the same seed gives the same text, whatever the batch size, up to the
    rounding of a probability.

    Raises: InputError where a beam is wider than the vocabulary, a prompt has no token, prompt and
    response exceed the context, or a forecast is missing.
    """
    n_tokens, eos = len(tokenizer), tokenizer.eos_token_id
    ids = encode_prompts(tokenizer, prompts)
    _check(policy, ids, how, n_tokens, forecast)
    noise = torch.rand(
        len(ids), how.max_new_tokens, generator=torch.Generator().manual_seed(seed)
    )  # fmt: skip
    found: dict[int, tuple[list[int], float]] = {}
    for part in _batches(ids, how):
        some = [ids[i] for i in part]
        if how.decoder == "mcts":
            answers = mcts(
                policy, some, forecast, beta=how.beta, candidates=how.candidates,
                simulations=how.simulations, exploration=how.exploration,
                max_new_tokens=how.max_new_tokens, n_tokens=n_tokens, eos=eos,
            )  # fmt: skip
        elif how.decoder == "guided":
            guided = Guided(
                policy, some, forecast,
                beta=how.beta, candidates=how.candidates, n_tokens=n_tokens,
            )  # fmt: skip
            answers = beam(guided, len(some), how, eos)
        elif how.decoder == "beam":
            answers = beam(Cursor(policy, some, n_tokens), len(some), how, eos)
        else:
            answers = draw(Cursor(policy, some, n_tokens), noise[part], how, eos)
        found.update(zip(part, answers, strict=True))
    responses = []
    for i, prompt in enumerate(ids):
        tokens, score = found[i]
        text = text_after(tokenizer, prompt, tokens)
        responses.append(Decoded(text, prompt, tokens, score, ended=tokens[-1] == eos))
    return responses


def text_after(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]
) -> str:
    """What a response adds to its prompt's text, with its spaces and line breaks, without the end.

    A decoder may drop the first space of a text, so it is asked with the prompt in front.
    """

    def plain(ids: Sequence[int]) -> str:
        return tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    before, whole = plain(prompt), plain([*prompt, *tokens])
    return whole[len(before) :] if whole.startswith(before) else plain(tokens)


def sample(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    greedy: bool = False,
    batch_size: int = 128,
) -> list[str]:
    """One response a prompt: sampled from the whole distribution (no top-k), or the greedy one.

    A response that has not ended after `max_new_tokens` is returned as it stands. Text comes back
    without the end-of-text token and, where it has words, with one leading space.
    """
    how = Decoding(
        decoder="greedy" if greedy else "sample", temperature=1.0 if greedy else temperature,
        max_new_tokens=max_new_tokens, batch_size=batch_size,
    )  # fmt: skip
    return [found.text for found in decode(model, tokenizer, prompts, how, seed=seed)]


def draw(cursor: Cursor, noise: Tensor, how: Decoding, eos: int) -> list[tuple[list[int], float]]:
    """(tokens, Σ log π) of each row: greedy, or sampled with `noise` (N, T) uniform on [0, 1).

    Rows leave the batch as soon as they have ended.
    """
    written = [[] for _ in noise]
    total = torch.zeros(len(noise))
    alive = torch.arange(len(noise))
    for t in range(how.max_new_tokens):
        if how.decoder == "greedy":
            token = cursor.logp.argmax(dim=-1)
        else:
            token = pick(cursor.logp / how.temperature, noise[alive, t], how.top_k)
        total[alive] += cursor.logp.gather(1, token[:, None])[:, 0].cpu()
        for i, a in zip(alive.tolist(), token.tolist(), strict=True):
            written[i].append(a)
        (going,) = (token != eos).nonzero(as_tuple=True)
        if not len(going) or t + 1 == how.max_new_tokens:
            break
        if len(going) < len(token):
            alive, token = alive[going.cpu()], token[going]
            cursor.keep(going)
        cursor.append(token)
    return list(zip(written, total.tolist(), strict=True))


def pick(logits: Tensor, noise: Tensor, top_k: int | None = None) -> Tensor:
    """The token at which the cumulated softmax of each row passes its `noise`: (N, V) to (N,)."""
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    passed = logits.softmax(dim=-1).cumsum(dim=-1)
    # `right`: a token without probability adds nothing, so the first to pass is never one
    mark = noise[:, None].to(passed) * passed[:, -1:]
    return torch.searchsorted(passed, mark, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def beam(
    cursor: Cursor | Guided, n_prompts: int, how: Decoding, eos: int
) -> list[tuple[list[int], float]]:
    """(tokens, score) of each prompt's best response: total / length^length_penalty.

    Each step ranks all continuations of the `beams` unfinished texts by their totals; among the
    first `beams` those with the end of text are finished, and the best unfinished ones go on.
    Having `max_new_tokens` tokens also finishes a text. No text is given up that could still win,
    so this is `generate` with early_stopping="never". One beam without penalty is greedy.
    """
    width, steps, v = how.beams, how.max_new_tokens, cursor.logp.shape[1]
    # Until the first token there is one text: the others start without probability.
    total = torch.full((n_prompts, width), -torch.inf, device=cursor.logp.device)
    total[:, 0] = 0.0
    written = torch.zeros(n_prompts, width, 0, dtype=torch.int64, device=total.device)
    best = torch.full((n_prompts,), -torch.inf, device=total.device)
    answers = [[] for _ in range(n_prompts)]
    alive = torch.arange(n_prompts, device=total.device)
    cursor.keep(alive.repeat_interleave(width))
    for t in range(steps):
        grown = (total[:, :, None] + cursor.logp.view(-1, width, v)).flatten(1)
        # each text has one end, so among twice as many at least `width` go on
        score, index = grown.topk(2 * width)
        parent, token = index // v, index % v
        texts = torch.cat([_pick_rows(written, parent), token[:, :, None]], dim=2)
        ends = (token == eos) | (t + 1 == steps)
        ended = score.masked_fill(~ends, -torch.inf)[:, :width] / (t + 1) ** how.length_penalty
        top, which = ended.max(dim=1)
        for row in (top > best[alive]).nonzero()[:, 0].tolist():
            answers[alive[row]] = texts[row, which[row]].tolist()
        best[alive] = best[alive].maximum(top)
        if t + 1 == steps:
            break
        total, order = score.masked_fill(ends, -torch.inf).topk(width)
        if cursor.only_falls:  # at best a total stays as it is and is divided by all steps
            going = total[:, 0] / steps**how.length_penalty > best[alive]
        else:
            going = total[:, 0] > -torch.inf
        if not going.any():
            break
        first = torch.arange(len(alive), device=total.device)[:, None] * width
        rows = first + parent.gather(1, order)
        total, alive = total[going], alive[going]
        written = _pick_rows(texts, order)[going]
        cursor.keep(rows[going].flatten())
        cursor.append(written[:, :, -1].flatten())
    return list(zip(answers, best.tolist(), strict=True))


def _pick_rows(table: Tensor, rows: Tensor) -> Tensor:
    """table (P, B, T) with its rows (P, K) chosen for each prompt: (P, K, T)."""
    return table.gather(1, rows[:, :, None].expand(-1, -1, table.shape[2]))


def _batches(ids: Sequence[list[int]], how: Decoding) -> Iterator[list[int]]:
    """Numbers of prompts of like length, so many that their texts fill a batch."""
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), ids[i]))
    size = max(1, how.batch_size // how.beams)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _check(policy, ids, how: Decoding, n_tokens: int, forecast) -> None:
    if how.beams > n_tokens:
        raise InputError(
            f"beams is {how.beams}, more than the vocabulary's {n_tokens} tokens; lower it."
        )
    if how.decoder in ("guided", "mcts") and forecast is None:
        raise InputError(
            f"The decoder {how.decoder} needs a forecast of what a text earns; pass one."
        )
    if not all(ids):
        raise InputError("A prompt has no token to continue; give each prompt some text.")
    models, _ = parts(policy)
    context = min(getattr(m.config, "max_position_embeddings", sys.maxsize) for m in models)
    longest = max(map(len, ids), default=0)
    if longest + how.max_new_tokens > context:
        raise InputError(
            f"A prompt of {longest} tokens and max_new_tokens {how.max_new_tokens} exceed the "
            f"model's context of {context}; lower max_new_tokens or shorten the prompt."
        )
