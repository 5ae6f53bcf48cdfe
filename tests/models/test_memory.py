"""Tokens one at a time, remembered, give what the whole row gives at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.models.functional import apart, model_of
from flaxpretrain.models.memory import remember
from tests import toys
from tests.tolerances import REMEMBERED_FLOAT32

DECODERS = {
    "gpt2": toys.gpt2(),
    "gpt2-scaled-by-layer": toys.gpt2(scale_attn_by_inverse_layer_idx=True),
}
ENCODER_DECODERS = {
    "t5-v1_0": toys.t5(),
    "t5-v1_1": toys.t5(
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_decoder_layers=3
    ),
    "bart": toys.bart(),
    "bart-scaled": toys.bart(scale_embedding=True, decoder_layers=1),
}
LENGTH, ROOM = 9, 12
FIRST = (1, 4)
"""How many tokens come at once before the others come one by one."""


def network(config):
    """A network whose tokens matter to each other: its parameters, and how to bind them."""
    model = model_of(config.build)
    params = jax.tree.map(lambda x: x if x.ndim < 3 else 2 * x, model.init(jax.random.key(0)))
    return params, model.bind


def ids(rows, length, seed=1):
    return jax.random.randint(jax.random.key(seed), (rows, length), 5, 300)


def remembered(module, ids, segments, memory, first, embed):
    """Hidden states of a row whose `first` tokens come at once and the others one by one."""
    layers, found = apart(module.decoder.layers), []
    for start, stop in [(0, first), *((i, i + 1) for i in range(first, ids.shape[1]))]:
        seen = jnp.sum((memory.segment_ids > 0).astype(jnp.int32), axis=1, keepdims=True)
        places = jnp.maximum(
            seen + jnp.cumsum((segments[:, start:stop] > 0).astype(jnp.int32), axis=1) - 1, 0
        )
        hidden = embed(ids[:, start:stop], segments[:, start:stop], places)
        hidden, memory = module.recall(layers, hidden, segments[:, start:stop], memory)
        found.append(hidden)
    return jnp.concatenate(found, axis=1)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_remembers_rows_padded_on_the_left(name):
    params, bind = network(DECODERS[name])
    tokens = ids(3, LENGTH)
    segments = (jnp.arange(LENGTH)[None] >= jnp.array([[0], [1], [3]])).astype(jnp.int32)

    @jax.jit
    def both(params):
        module = bind(params)
        whole = module.decode_causally(module.embed(tokens, segments), segments)
        memory = remember(apart(module.decoder.layers), 3, ROOM)
        return whole, [remembered(module, tokens, segments, memory, n, module.embed) for n in FIRST]

    whole, several = both(params)
    real = np.asarray(segments) > 0
    for found in several:
        np.testing.assert_allclose(
            np.asarray(found)[real], np.asarray(whole)[real], rtol=0, atol=REMEMBERED_FLOAT32
        )


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_an_encoder_decoder_remembers_rows_that_may_share_a_source(name):
    params, bind = network(ENCODER_DECODERS[name])
    source, shared = ids(2, 7), 3
    target = ids(2 * shared, LENGTH, seed=2)
    source_segments = jnp.array([[1] * 7, [1] * 4 + [0] * 3])
    segments, each = jnp.ones_like(target), jnp.repeat(jnp.arange(2), shared)

    @jax.jit
    def both(params):
        module = bind(params)
        encoded = module.encode(module.embed(source, source_segments), source_segments)
        hidden = module.embed_decoder(target, segments)
        whole = module.decode(hidden, segments, encoded[each], source_segments[each])
        layers = apart(module.decoder.layers)
        memory = remember(layers, 2 * shared, ROOM, encoded, source_segments)
        return whole, [
            remembered(module, target, segments, memory, n, module.embed_decoder) for n in FIRST
        ]

    whole, several = both(params)
    for found in several:
        np.testing.assert_allclose(found, whole, rtol=0, atol=REMEMBERED_FLOAT32)


def test_rows_picked_from_a_memory_go_on_as_their_originals():
    params, bind = network(toys.gpt2())
    tokens, order = ids(3, LENGTH), jnp.array([2, 0, 0])

    @jax.jit
    def both(params):
        module = bind(params)
        layers = apart(module.decoder.layers)

        def read(memory, tokens, places):
            ones = jnp.ones_like(tokens)
            return module.recall(layers, module.embed(tokens, ones, places), ones, memory)

        _, memory = read(remember(layers, 3, ROOM), tokens[:, :5], None)
        hidden, _ = read(memory.picked(order), tokens[:, 5:6], jnp.full((3, 1), 5))
        after = jnp.concatenate([tokens[order, :5], tokens[:, 5:6]], axis=1)
        ones = jnp.ones_like(after)
        return hidden[:, 0], module.decode_causally(module.embed(after, ones), ones)[:, 5]

    np.testing.assert_allclose(*both(params), rtol=0, atol=REMEMBERED_FLOAT32)
