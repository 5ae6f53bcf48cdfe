"""What a text must begin and end with and may not repeat, whichever way tokens are chosen."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flaxpretrain.errors import UserError
from flaxpretrain.generation.strategies import NEVER


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Special tokens and restrictions, as Transformers' generation configuration has them.

    eos: tokens that end a text; with none of them, only its length does.
    pad: stands after the end.
    start: what a decoder that has an encoder begins from; None for decoders alone.
    forced_bos: the first token after that, whatever the scores say.
    forced_eos: the last token of a text that reaches the greatest length.
    repetition_penalty: scores of tokens that are there already, the prompt's too, are divided by
        this where positive and multiplied where negative; 1 changes nothing.
    no_repeat_ngram_size: no so many tokens in a row appear twice; 0 for any.
    min_new_tokens: no text ends before it has so many tokens.

    References: https://arxiv.org/abs/1909.05858, section 4.1, for the penalty; Transformers
    generation/logits_process.py.
    """

    eos: tuple[int, ...] = ()
    pad: int = 0
    start: int | None = None
    forced_bos: int | None = None
    forced_eos: int | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        """Raises UserError on numbers that cannot be."""
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"--repetition-penalty must be above 0; got {self.repetition_penalty}")
        for name in ("no_repeat_ngram_size", "min_new_tokens"):
            if getattr(self, name) < 0:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} must be 0 or more; got {getattr(self, name)}")

    def check_fits(self, vocab_size: int) -> None:
        """Raises UserError on a special token that the model does not have."""
        given = {"eos": self.eos, "pad": (self.pad,)} | {
            name: (token,)
            for name in ("start", "forced_bos", "forced_eos")
            if (token := getattr(self, name)) is not None
        }
        for name, tokens in given.items():
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise UserError(
                        f"the {name.replace('_', ' ')} token is {token}, but the model has tokens "
                        f"0 to {vocab_size - 1}"
                    )

    def adjusted(
        self,
        scores: Float[Array, "B V"],
        said: Int[Array, "B S"],
        is_said: Bool[Array, "B S"],
        step: Int[Array, ""],
        max_new_tokens: int,
    ) -> Float[Array, "B V"]:
        """Scores of the token that is number `step` of the new ones, 0 the first.

        `said` holds prompt and new tokens, those of `is_said` in the last `max_new_tokens` places
        filled from the left.
        """
        if self.repetition_penalty != 1.0:
            seen = _marked(scores, said, is_said)
            penalty = self.repetition_penalty
            penalised = jnp.where(scores < 0, scores * penalty, scores / penalty)
            scores = jnp.where(seen, penalised, scores)
        if self.no_repeat_ngram_size:
            length = said.shape[1] - max_new_tokens + step
            barred = _completing(said, is_said, length, self.no_repeat_ngram_size)
            after = said[:, self.no_repeat_ngram_size - 1 :]
            scores = jnp.where(_marked(scores, after, barred), NEVER, scores)
        if self.min_new_tokens and self.eos:
            ends = jnp.zeros(scores.shape[1], bool).at[jnp.array(self.eos)].set(True)
            scores = jnp.where((step < self.min_new_tokens) & ends[None], NEVER, scores)
        for token, when in ((self.forced_bos, 0), (self.forced_eos, max_new_tokens - 1)):
            if token is not None:
                only = jnp.full(scores.shape[1], NEVER).at[token].set(0.0)
                scores = jnp.where(step == when, only[None], scores)
        return scores


def _marked(
    scores: Float[Array, "B V"], tokens: Int[Array, "B S"], where: Bool[Array, "B S"]
) -> Bool[Array, "B V"]:
    """Which tokens of the vocabulary are among a row's own."""
    rows = jnp.arange(len(tokens))[:, None]
    # Out of bounds is dropped.
    places = jnp.where(where, tokens, scores.shape[1])
    return jnp.zeros(scores.shape, bool).at[rows, places].set(True, mode="drop")


def _completing(
    said: Int[Array, "B S"], is_said: Bool[Array, "B S"], length: Int[Array, ""], size: int
) -> Bool[Array, "B W"]:
    """Which runs of `size` tokens begin as the last `size - 1` tokens of `length` do."""
    count = said.shape[1] - size + 1
    last = jax.lax.dynamic_slice_in_dim(said, length - size + 1, size - 1, axis=1)
    matches = is_said[:, :count] & (jnp.arange(count) + size - 1 < length)[None]
    for number in range(size - 1):
        matches &= said[:, number : number + count] == last[:, number : number + 1]
    return matches


def rules_of(config: Any, generation: Mapping[str, Any] | None = None) -> Rules:
    """The rules that a model's configuration states.

    `generation` is the content of a Transformers generation_config.json, which goes before.
    """
    values = {
        name: value
        for name in ("eos_token_id", "pad_token_id", "decoder_start_token_id")
        if (value := getattr(config, name, None)) is not None
    }
    if getattr(config, "forced_eos_token_id", None) is not None:
        values["forced_eos_token_id"] = config.forced_eos_token_id
    values |= {k: v for k, v in (generation or {}).items() if v is not None}
    eos = values.get("eos_token_id", ())
    eos = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    forced_eos = values.get("forced_eos_token_id")
    if isinstance(forced_eos, list):
        forced_eos = forced_eos[0] if forced_eos else None
    has_encoder = hasattr(config, "decoder_start_token_id")
    return Rules(
        eos=eos,
        pad=values.get("pad_token_id", eos[0] if eos else 0),
        start=values.get("decoder_start_token_id") if has_encoder else None,
        forced_bos=values.get("forced_bos_token_id") if has_encoder else None,
        forced_eos=forced_eos,
        repetition_penalty=float(values.get("repetition_penalty", 1.0)),
        no_repeat_ngram_size=int(values.get("no_repeat_ngram_size", 0)),
        min_new_tokens=int(values.get("min_new_tokens", 0)),
    )
