"""Models: tiny Pythias from a config, any hub id, any local directory.

  "tiny"               2 layers of width 64 with random weights, for laptops
  "random:pythia-14m"  ... "random:pythia-2.8b": Pythia's shapes with random weights
  anything else        a local directory or a hub id, read by `AutoModelForCausalLM`

Weights are float32 whatever a checkpoint holds (Pythia's are float16): small DPO steps vanish in
half precision. Every dropout is off: with dropout on, the loss at step 0 is not ln 2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qlearn.errors import InputError
from qlearn.lm.logprobs import Row, sum_logps
from qlearn.lm.model_files import is_shape
from qlearn.lm.pretrained import load_weights


@dataclass(frozen=True)
class Shape:
    """Layers, width, heads, vocabulary (None: the tokenizer's) and context of a GPT-NeoX."""

    layers: int
    width: int
    heads: int
    vocabulary: int | None = 50_304  # Pythia's tables; its tokenizer fills 50,277 rows
    context: int = 2048
    init: float = 0.02  # standard deviation of the random weights


SHAPES = {
    # At width 64 the usual 0.02 starts so small that learning to copy takes twice as long.
    "tiny": Shape(2, 64, 4, vocabulary=None, context=256, init=0.1),
    "pythia-14m": Shape(6, 128, 4),
    "pythia-31m": Shape(6, 256, 8),
    "pythia-70m": Shape(6, 512, 8),
    "pythia-160m": Shape(12, 768, 12),
    "pythia-410m": Shape(24, 1024, 16),
    "pythia-1b": Shape(16, 2048, 8),
    "pythia-1.4b": Shape(24, 2048, 16),
    "pythia-2.8b": Shape(32, 2560, 32),
}


def config_of(shape: Shape, tokenizer: PreTrainedTokenizerBase) -> GPTNeoXConfig:
    """Pythia's architecture at a shape: rotary on a quarter, parallel residual, untied tables."""
    return GPTNeoXConfig(
        vocab_size=shape.vocabulary or len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.context,
        initializer_range=shape.init,
        rotary_pct=0.25,
        use_parallel_residual=True,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bos_token_id=tokenizer.eos_token_id,  # GPTNeoXConfig's own default is 2, a real word
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def load_model(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The model called `name`, with weights in `dtype`, in eval mode, without dropout.

    Raises: InputError for an unknown shape, an unreachable hub, a directory without a model or
    without all of its weights, a vocabulary smaller than the tokenizer's, a model that reads what
    comes after a token, or one whose head does more than one linear map.
    """
    if is_shape(name):
        model = _random_model(name.removeprefix("random:"), tokenizer, seed)
    else:
        model = load_weights(AutoModelForCausalLM, name, "language model", dtype)
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise InputError(
            f"The model {name} has {rows} rows for tokens but the tokenizer has {len(tokenizer)} "
            "tokens; pass the tokenizer that belongs to the model with --tokenizer."
        )
    no_dropout(model).eval()
    _check_body_and_head(model, name)
    return model


def no_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with every dropout at rate 0, in training too."""
    for module in model.modules():
        # some layers hold their rate as a plain number (GPT-NeoX: attention_dropout)
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _random_model(shape: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    if shape not in SHAPES:
        raise InputError(f"There is no shape {shape!r}; choose one of {', '.join(SHAPES)}.")
    if tokenizer.eos_token_id is None:
        raise InputError("The tokenizer needs an end-of-text token.")
    config = config_of(SHAPES[shape], tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(config)


def _check_body_and_head(model: PreTrainedModel, name: str) -> None:
    """Asks of a model, by trial on four tokens, what `logprobs` takes for granted.

    The state of a token depends on nothing behind it: rows are padded on the right without a mask.
    And logits are head(state) and nothing else: `logprobs` applies the head itself.
    """
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0]], device=model.device)  # (2, 4)
    with torch.no_grad():
        states = model.base_model(input_ids=ids).last_hidden_state  # (2, 4, D)
        one, two = states[:, :3]
        if not torch.allclose(one, two, rtol=0, atol=1e-3 * states.abs().max().item()):
            raise InputError(
                f"The model {name} ({model.config.model_type}) is bidirectional: what it says of "
                "a token depends on those that follow, so it is no policy that writes one token "
                "after the other; use a causal language model."
            )
        direct = model.get_output_embeddings()(states)
        if not torch.allclose(model(ids).logits, direct, atol=1e-4):
            raise InputError(
                f"The model {name} changes its logits after the output head (a cap or a scale), "
                "which qlearn does not support; use a model with a plain linear head."
            )


def note_if_surprised(model: PreTrainedModel, rows: Sequence[Row], name: str) -> None:
    """Says it where the model `name` finds rows less likely than an even guess over its tokens.

    That is what another model's tokenizer does, so it is asked where the user names one. The first
    sixteen `rows` (prompt ids, completion ids) are scored. A model of random weights knows no row.
    """
    rows = list(rows[:16])
    if not rows or is_shape(name):
        return
    n_tokens = sum(len(completion) for _, completion in rows)
    nats = -sum_logps(model, rows, batch_size=4).sum().item() / n_tokens
    even = math.log(model.get_output_embeddings().weight.shape[0])
    if nats > even:
        print(
            f"note: {name} finds the rows unlikely, {nats:.1f} nats a token where an even guess "
            f"has {even:.1f}; is the tokenizer that of this model?"
        )


def explain_table_sizes(policy: PreTrainedModel, other: PreTrainedModel, role: str) -> None:
    """Says it where two models of one tokenizer have tables of different sizes.

    That is lawful: tables are padded to round numbers, and a row that no token names is never read.
    """
    rows = [m.get_output_embeddings().weight.shape[0] for m in (policy, other)]
    if rows[0] != rows[1]:
        print(
            f"note: the policy has {rows[0]} rows for tokens and the {role} {rows[1]}; their "
            "tokenizer is the same, and the rows that only one has belong to no token of the data."
        )
