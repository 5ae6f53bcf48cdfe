"""Beam search, token for token that of Transformers, whole inside one jitted function.

Reference: Transformers generation/utils.py, _beam_search and what it calls.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flaxpretrain.generation.rules import Rules
from flaxpretrain.generation.search import Found, Network, Prompts
from flaxpretrain.generation.strategies import Beam
from flaxpretrain.models.memory import Memory

_OUT = -1e9
"""Added to the score of what is out of the race."""


class _State(NamedTuple):
    """N beginnings and N whole texts for each of B prompts, both the best first."""

    step: Int[Array, ""]
    running: Int[Array, "B N T"]
    running_scores: Float[Array, "B N"]
    texts: Int[Array, "B N T"]
    lengths: Int[Array, "B N"]
    scores: Float[Array, "B N"]
    is_text: Bool[Array, "B N"]
    hopeful: Bool[Array, "B 1"]
    exhausted: Bool[Array, ""]
    memory: Memory


def _best(scores: Float[Array, "B C"], count: int, *arrays: Array) -> list[Array]:
    """The best candidates, and what else is known of each: arrays [B, C, ...]."""
    index = jax.lax.top_k(scores, count)[1]
    return [_taken(array, index) for array in (scores, *arrays)]


def _taken(array: Array, index: Int[Array, "B N"]) -> Array:
    return array[jnp.arange(len(index))[:, None], index]


def _beginning(memory: Memory, shape: tuple[int, int, int], pad: int) -> _State:
    """The state before the first token, for [B, N, T] beginnings."""
    blank, batch, size = jnp.full(shape, pad, jnp.int32), *shape[:2]
    first = jnp.arange(size)[None] == jnp.zeros((batch, 1), jnp.int32)
    return _State(
        step=jnp.zeros((), jnp.int32),
        running=blank,
        # All beginnings are the same at first: only one of them counts.
        running_scores=jnp.where(first, 0.0, _OUT),
        texts=blank,
        lengths=jnp.zeros((batch, size), jnp.int32),
        scores=jnp.full((batch, size), _OUT),
        is_text=jnp.zeros((batch, size), bool),
        hopeful=jnp.ones((batch, 1), bool),
        exhausted=jnp.zeros((), bool),
        memory=memory,
    )


def beam_search(
    network: Network, prompts: Prompts, *, strategy: Beam, rules: Rules, max_new_tokens: int
) -> Found:
    """The `size` best texts of every prompt, the best first, and their scores."""
    batch, size, longest = len(prompts.ids), strategy.size, max_new_tokens
    said = jnp.repeat(prompts.ids, size, axis=0)
    is_said = jnp.repeat(prompts.segment_ids > 0, size, axis=0)
    # As many as surely leave `size` beginnings when others end.
    kept = max(2, 1 + len(rules.eos)) * size
    # By numpy: what Transformers computes in double precision, too.
    powers = (np.arange(1, longest + 1) ** float(strategy.length_penalty)).astype(np.float32)
    eos = jnp.array(rules.eos, jnp.int32)

    def judge(state: _State, logits: Float[Array, "R V"]) -> _State:
        step, penalty = state.step, jnp.asarray(powers)[state.step]
        told = state.running.reshape(batch * size, longest)
        is_told = jnp.broadcast_to((jnp.arange(longest) < step)[None], told.shape)
        scores = rules.adjusted(
            jax.nn.log_softmax(logits, axis=-1),
            jnp.concatenate([said, told], axis=1),
            jnp.concatenate([is_said, is_told], axis=1),
            step,
            longest,
        )
        scores = scores.reshape(batch, size, -1) + state.running_scores[:, :, None]
        top, places = jax.lax.top_k(scores.reshape(batch, -1), kept)
        beams, tokens = jnp.divmod(places.astype(jnp.int32), scores.shape[-1])
        sequences = jax.lax.dynamic_update_slice(
            _taken(state.running, beams), tokens[:, :, None], (0, 0, step)
        )
        ends = jnp.isin(tokens, eos) | (step + 1 >= longest)

        running_scores, running, from_beams = _best(
            jnp.where(ends, top + _OUT, top), size, sequences, beams
        )
        # Only the best `size` may become texts; the others were there to go on with.
        becomes = ends & (jnp.arange(kept) < size)[None]
        full = jnp.all(state.is_text, axis=-1, keepdims=True) & (strategy.early_stopping is True)
        final = top / penalty
        for out in (full, ~state.hopeful, ~becomes):
            final += jnp.where(out, _OUT, 0.0)
        found, texts, lengths, is_text = _best(
            jnp.concatenate([state.scores, final], axis=1),
            size,
            jnp.concatenate([state.texts, sequences], axis=1),
            jnp.concatenate([state.lengths, jnp.full_like(tokens, 1) + step], axis=1),
            jnp.concatenate([state.is_text, becomes], axis=1),
        )

        rows = jnp.arange(batch, dtype=jnp.int32)[:, None] * size + from_beams
        to_the_end = strategy.early_stopping == "never" and strategy.length_penalty > 0
        possible = running_scores[:, :1] / (powers[-1] if to_the_end else penalty)
        worst = jnp.where(is_text, jnp.min(found, axis=1, keepdims=True), _OUT)
        return _State(
            step=step + 1,
            running=running,
            running_scores=running_scores,
            texts=texts,
            lengths=lengths,
            scores=found,
            is_text=is_text,
            hopeful=state.hopeful & jnp.any(possible > worst, axis=-1, keepdims=True),
            exhausted=jnp.all(ends),
            memory=state.memory.picked(rows.reshape(-1)),
        )

    def goes_on(state: _State) -> Bool[Array, ""]:
        done = jnp.all(state.is_text) & (strategy.early_stopping is True)
        return jnp.any(state.hopeful) & ~done & ~state.exhausted

    def advance(state: _State) -> _State:
        tokens = jax.lax.dynamic_slice_in_dim(state.running, state.step - 1, 1, axis=2)
        logits, memory = network.advance(state.memory, tokens.reshape(-1))
        return judge(state._replace(memory=memory), logits)

    logits, memory = network.start(prompts, longest - 1)
    each = jnp.repeat(jnp.arange(batch), size)
    state = _beginning(memory.picked(each), (batch, size, longest), rules.pad)
    state = jax.lax.while_loop(goes_on, advance, judge(state, logits[each]))
    return Found(
        state.texts.reshape(batch * size, longest),
        state.lengths.reshape(-1),
        state.scores.reshape(-1),
    )
