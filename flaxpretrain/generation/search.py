"""The loop over tokens, whole inside one jitted function: one token a row, chosen or drawn."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from flaxpretrain.generation.rules import Rules
from flaxpretrain.generation.strategies import Greedy, Sample
from flaxpretrain.models.functional import apart
from flaxpretrain.models.memory import Memory, remember


class Prompts(NamedTuple):
    """What decoders have read before their first new token.

    Their tokens are padded on the left, where segments are 0; for encoder-decoders they are the
    token to start from, and the source is padded on the right.
    """

    ids: Int[Array, "B P"]
    segment_ids: Int[Array, "B P"]
    source_ids: Int[Array, "B S"] | None = None
    source_segment_ids: Int[Array, "B S"] | None = None


class Found(NamedTuple):
    """New tokens, padded on the right, and how many they are, the one that ends them included.

    A row a text, those of a prompt side by side; `scores` are beam search's.
    """

    ids: Int[Array, "R T"]
    lengths: Int[Array, "R"]
    scores: Float[Array, "R"]


@dataclasses.dataclass(frozen=True)
class Network:
    """A module, its decoder's layers one by one, and its vocabulary without padding."""

    module: Any
    layers: Sequence[Any]
    vocab_size: int

    def start(self, prompts: Prompts, room: int) -> tuple[Float[Array, "B V"], Memory]:
        """Reads the prompts: scores of the first new token, and a memory with room for tokens."""
        module, encoded = self.module, None
        if prompts.source_ids is not None:
            hidden = module.embed(prompts.source_ids, prompts.source_segment_ids)
            encoded = module.encode(hidden, prompts.source_segment_ids)
        rows, length = prompts.ids.shape
        memory = remember(self.layers, rows, length + room, encoded, prompts.source_segment_ids)
        places = jnp.cumsum(prompts.segment_ids, axis=1) - 1
        return self._scores(prompts.ids, prompts.segment_ids, jnp.maximum(places, 0), memory)

    def advance(
        self, memory: Memory, tokens: Int[Array, "R"]
    ) -> tuple[Float[Array, "R V"], Memory]:
        """Reads one more token of every row."""
        places = jnp.sum(memory.segment_ids, axis=1, keepdims=True)
        ids = tokens[:, None]
        return self._scores(ids, jnp.ones_like(ids), places, memory)

    def _scores(
        self, ids: Array, segment_ids: Array, places: Array, memory: Memory
    ) -> tuple[Array, Memory]:
        alone = memory.source_segment_ids is None
        embed = self.module.embed if alone else self.module.embed_decoder
        hidden = embed(ids, segment_ids, places)
        hidden, memory = self.module.recall(self.layers, hidden, segment_ids, memory)
        return self.module.logits(hidden[:, -1:])[:, 0, : self.vocab_size], memory


def network_of(module: Any, vocab_size: int) -> Network:
    """A module ready to decode; to be made outside of the loop over tokens."""
    return Network(module, apart(module.decoder.layers), vocab_size)


class _State(NamedTuple):
    step: Int[Array, ""]
    said: Int[Array, "R S"]
    is_said: Bool[Array, "R S"]
    lengths: Int[Array, "R"]
    finished: Bool[Array, "R"]
    memory: Memory


def search(
    network: Network,
    prompts: Prompts,
    keys: Key[Array, "R"],
    *,
    strategy: Greedy | Sample,
    rules: Rules,
    max_new_tokens: int,
) -> Found:
    """One text for every key: R is a multiple of the B prompts, whose texts lie side by side."""
    rows = jnp.repeat(jnp.arange(len(prompts.ids)), len(keys) // len(prompts.ids))
    logits, memory = network.start(prompts, max_new_tokens - 1)
    beginning = prompts.ids.shape[1]

    def choose(state: _State, logits: Float[Array, "R V"]) -> _State:
        scores = rules.adjusted(logits, state.said, state.is_said, state.step, max_new_tokens)
        drawn = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, state.step)
        tokens = jnp.where(state.finished, rules.pad, strategy.choose(scores, drawn))
        place = beginning + state.step
        ends = jnp.isin(tokens, jnp.array(rules.eos, jnp.int32))
        return _State(
            step=state.step + 1,
            said=jax.lax.dynamic_update_slice(state.said, tokens[:, None], (0, place)),
            is_said=jax.lax.dynamic_update_slice(
                state.is_said, ~state.finished[:, None], (0, place)
            ),
            lengths=state.lengths + (~state.finished).astype(jnp.int32),
            finished=state.finished | ends,
            memory=state.memory,
        )

    def goes_on(state: _State) -> Bool[Array, ""]:
        return (state.step < max_new_tokens) & ~jnp.all(state.finished)

    def advance(state: _State) -> _State:
        place = beginning + state.step - 1
        tokens = jax.lax.dynamic_slice_in_dim(state.said, place, 1, axis=1)[:, 0]
        logits, memory = network.advance(state.memory, tokens)
        return choose(state._replace(memory=memory), logits)

    nothing = jnp.full((len(keys), max_new_tokens), rules.pad, jnp.int32)
    state = _State(
        step=jnp.zeros((), jnp.int32),
        said=jnp.concatenate([prompts.ids[rows], nothing], axis=1),
        is_said=jnp.concatenate([prompts.segment_ids[rows] > 0, nothing < 0], axis=1),
        lengths=jnp.zeros(len(keys), jnp.int32),
        finished=jnp.zeros(len(keys), bool),
        memory=memory.picked(rows) if len(keys) > len(prompts.ids) else memory,
    )
    state = jax.lax.while_loop(goes_on, advance, choose(state, logits[rows]))
    return Found(state.said[:, beginning:], state.lengths, jnp.zeros(len(keys)))
