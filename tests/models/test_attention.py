"""Attention stays within segments, exactly, and every backend computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.errors import UserError
from flaxpretrain.models import attention
from flaxpretrain.models.attention import cpu_attention, splash_attention, xla_attention
from flaxpretrain.models.functional import model_of
from flaxpretrain.models.positions import restarting
from flaxpretrain.training.sharding import make_mesh
from tests import toys
from tests.tolerances import FLASH_FLOAT32, PIECES_FLOAT32

MODEL = model_of(toys.bert().build)
SEGMENTS = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0]])


@pytest.fixture(scope="module")
def params():
    """Kernels large enough that every token matters to all that may see it."""
    return jax.tree.map(lambda x: x if x.ndim < 3 else 10 * x, MODEL.init(jax.random.key(0)))


def reach(params, segments):
    """|d hidden[i] / d embedding[j]| along a random direction of hidden[i], [L, L]."""
    ids = jax.random.randint(jax.random.key(1), segments.shape, 5, 300)
    module = MODEL.bind(params)
    embedded = module.embed(ids, segments, restarting(segments))
    toward = jax.random.normal(jax.random.key(2), (embedded.shape[-1],))

    @jax.jit
    def gradient(place):
        def along(x):
            return MODEL.bind(params).encode(x, segments)[0, place] @ toward

        return jnp.abs(jax.grad(along)(embedded)[0]).sum(axis=-1)

    return np.stack([gradient(place) for place in range(segments.shape[1])])


def test_the_gradient_between_segments_and_from_padding_is_exactly_zero(params):
    lengths = reach(params, SEGMENTS)
    segments = np.asarray(SEGMENTS)[0]
    same = segments[:, None] == segments[None]
    assert np.all(lengths[~same] == 0.0)
    assert np.all(lengths[same] > 0.0)


def test_a_row_of_padding_alone_is_finite_with_finite_gradients(params):
    assert np.all(np.isfinite(reach(params, jnp.zeros((1, 7), jnp.int32))))


def test_a_packed_row_equals_its_pieces_alone(params):
    ids = jax.random.randint(jax.random.key(2), SEGMENTS.shape, 5, 300)

    def encode(ids, segments):
        module = MODEL.bind(params)
        return module.encode(module.embed(ids, segments, restarting(segments)), segments)[0]

    packed = encode(ids, SEGMENTS)
    for start, stop in ((0, 5), (5, 8), (8, 10)):
        alone = encode(ids[:, start:stop], jnp.ones((1, stop - start), jnp.int32))
        np.testing.assert_allclose(packed[start:stop], alone, rtol=0, atol=PIECES_FLOAT32)


def qkv(length, size=64, heads=2, rows=2):
    shape = (rows, heads, length, size)
    query, key, value, toward = jax.random.normal(jax.random.key(3), (4, *shape))
    bounds = jax.random.randint(jax.random.key(4), (rows, 1), 1, length)
    segments = jnp.where(jnp.arange(length)[None] < bounds, 1, 2)
    return query / 8, key, value, segments.at[0, -5:].set(0), toward


KINDS = {
    "whole": {},
    "causal": {"causal": True},
    "window": {"window": 100},
    "causal-window": {"causal": True, "window": 30},
}


@pytest.mark.parametrize(
    ("kind", "length", "key_length", "size"),
    [
        ("whole", 128, 128, 64),
        ("whole", 200, 200, 16),
        ("whole", 70, 300, 8),
        ("causal", 200, 200, 16),
        ("causal", 640, 640, 64),
        ("window", 640, 640, 16),
        ("causal-window", 200, 200, 16),
    ],
)
def test_splash_equals_xla_in_values_and_gradients(kind, length, key_length, size):
    query, _, _, segments, toward = qkv(length, size)
    _, key, value, key_segments, _ = qkv(key_length, size)

    def along(function, **options):
        def scalar(*qkv):
            context = function(*qkv, segments, key_segments, **KINDS[kind], **options)
            return jnp.sum(jnp.where((segments > 0)[:, None, :, None], context * toward, 0.0))

        return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2)))(query, key, value)

    flash, plain = along(splash_attention, interpret=True), along(xla_attention)
    np.testing.assert_allclose(flash[0], plain[0], rtol=1e-5)
    for mine, reference in zip(flash[1], plain[1], strict=True):
        np.testing.assert_allclose(mine, reference, rtol=0, atol=FLASH_FLOAT32)


@pytest.mark.parametrize(
    ("kind", "length", "key_length", "rate"),
    [
        ("whole", 64, 64, 0.0),
        ("whole", 24, 40, 0.3),
        ("causal", 40, 40, 0.1),
        ("window", 130, 130, 0.0),
        ("causal-window", 70, 70, 0.2),
    ],
)
def test_the_cpu_form_equals_xla_in_values_and_gradients(kind, length, key_length, rate):
    query, _, _, segments, toward = qkv(length, 16)
    _, key, value, key_segments, _ = qkv(key_length, 16)
    options = {**KINDS[kind], "rate": rate, "keys": jax.random.split(jax.random.key(5), 2)}

    def along(function):
        def scalar(*qkv):
            return jnp.sum(function(*qkv, segments, key_segments, **options) * toward)

        return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2)))(query, key, value)

    mine, reference = along(cpu_attention), along(xla_attention)
    np.testing.assert_allclose(mine[0], reference[0], rtol=1e-5)
    for one, other in zip(mine[1], reference[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=FLASH_FLOAT32)


def hidden_of(module, ids, segments):
    """The last hidden states, of the decoder where there is one."""
    encoded = module.encode(module.embed(ids, segments, restarting(segments)), segments)
    if not hasattr(module, "decode"):
        return encoded
    return module.decode(module.embed_decoder(ids, segments), segments, encoded, segments)


@pytest.mark.parametrize("make", [toys.bert, toys.bart, toys.t5], ids=["bert", "bart", "t5"])
def test_a_network_is_the_same_whatever_plain_attention_it_has(make):
    """Joined projections, attention to a source, and a bias, which the form for CPUs leaves."""
    model = model_of(make().build)
    params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))
    ids = jax.random.randint(jax.random.key(1), SEGMENTS.shape, 5, 300)

    def along(name):
        def scalar(params):
            module = model.bind(params)
            with attention.backend(name):
                hidden = hidden_of(module, ids, SEGMENTS)
            return jnp.mean(jnp.sin(jnp.where((SEGMENTS > 0)[..., None], hidden, 0.0)))

        return jax.jit(jax.value_and_grad(scalar))(params)

    (value, gradients), (expected, reference) = along("cpu"), along("xla")
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (gradients, reference)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=FLASH_FLOAT32)


def weights_of(segments, key_segments=None, **options):
    """Attention weights of equal scores, [B, L, S]."""
    key_segments = segments if key_segments is None else key_segments
    rows, length = key_segments.shape
    identity = jnp.broadcast_to(jnp.eye(length)[None, None], (rows, 1, length, length))
    query = jnp.zeros((*segments.shape[:1], 1, segments.shape[1], length))
    return np.asarray(xla_attention(query, identity, identity, segments, key_segments, **options))[
        :, 0
    ]


def expected_weights(segments, key_segments, seen):
    """The same, written token by token; `seen(i, j)` says what may be seen within a segment."""
    weights = np.zeros((segments.shape[1], key_segments.shape[1]))
    for i, j in np.ndindex(weights.shape):
        weights[i, j] = segments[0, i] == key_segments[0, j] and seen(i, j)
    return weights / weights.sum(axis=1, keepdims=True)


PREFIX = jnp.array([[1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]], bool)


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({}, lambda i, j: True),
        ({"causal": True}, lambda i, j: j <= i),
        ({"window": 1}, lambda i, j: abs(i - j) <= 1),
        ({"causal": True, "window": 2}, lambda i, j: 0 <= i - j <= 2),
        ({"causal": True, "prefix": PREFIX}, lambda i, j: j <= i or bool(PREFIX[0, j])),
    ],
    ids=["whole", "causal", "window", "causal-window", "prefix"],
)
def test_a_token_sees_what_its_kind_of_attention_allows_and_nothing_else(options, seen):
    expected = expected_weights(SEGMENTS, SEGMENTS, seen)
    np.testing.assert_allclose(weights_of(SEGMENTS, **options)[0], expected, rtol=1e-6)


def test_attention_to_another_row_sees_the_same_segment_there():
    source = jnp.array([[1, 1, 2, 3, 3, 3, 0]])
    expected = expected_weights(SEGMENTS, source, lambda i, j: True)
    np.testing.assert_allclose(weights_of(SEGMENTS, source)[0], expected, rtol=1e-6)


def test_a_bias_is_added_to_the_scores_and_has_a_gradient():
    bias = jax.random.normal(jax.random.key(5), (1, 1, 12, 12))
    expected = np.exp(bias[0, 0]) * (weights_of(SEGMENTS, causal=True)[0] > 0)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        weights_of(SEGMENTS, causal=True, bias=bias)[0], expected, rtol=1e-5, atol=1e-7
    )

    def second_of_third(bias):
        identity = jnp.eye(12)[None, None]
        return xla_attention(0 * identity, identity, identity, SEGMENTS, SEGMENTS, bias=bias)[
            0, 0, 2, 1
        ]

    gradient = jax.grad(second_of_third)(0 * bias)[0, 0]
    expected = np.zeros((12, 12))
    expected[2, :5] = -1 / 25
    expected[2, 1] += 1 / 5
    np.testing.assert_allclose(gradient, expected, atol=1e-7)


def test_what_flash_kernels_lack_is_computed_by_xla():
    query, key, value, segments, _ = qkv(40)
    bias = jax.random.normal(jax.random.key(5), (1, 2, 40, 40))
    plain = attention.attend(query, key, value, segments, bias=bias)
    for name in ("splash", "cudnn"):
        with attention.backend(name):
            assert attention.chosen_backend(plain=False)[1].layout == "BHLK"
            other = attention.attend(query, key, value, segments, bias=bias)
        np.testing.assert_array_equal(other, plain)


@pytest.mark.parametrize(
    ("heads", "fsdp", "context"), [(1, 2, 1), (4, 2, 1), (4, 1, 2)], ids=["one", "four", "context"]
)
def test_kernels_on_each_device_whether_or_not_the_mesh_divides_the_heads(heads, fsdp, context):
    query, key, value, segments, toward = qkv(8, size=4, heads=heads, rows=4)

    def along(function):
        def scalar(*qkv):
            return jnp.sum(function(*qkv, segments, segments) * toward)

        return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2)))(query, key, value)

    with jax.set_mesh(make_mesh(2, fsdp, 2, context=context)):
        mapped = along(attention.on_each_device(xla_attention, "BHLK", heads, 8))
    for mine, reference in zip(*map(jax.tree.leaves, (mapped, along(xla_attention))), strict=True):
        np.testing.assert_allclose(mine, reference, rtol=0, atol=FLASH_FLOAT32)


def test_a_kernel_that_counts_places_is_not_given_a_part_of_a_row():
    with jax.set_mesh(make_mesh(4, context=2)):
        assert not attention.is_plain(True, None, None, None)
        assert not attention.is_plain(False, 4, None, None)
        assert attention.is_plain(False, None, None, None)
    assert attention.is_plain(True, 4, None, None)


def test_flash_kernels_refuse_dropout_and_say_what_to_change():
    query, key, value, segments, _ = qkv(128)
    keys = jax.random.split(jax.random.key(0), 2)
    with attention.backend("splash"):
        with pytest.raises(UserError, match="attention: 'splash'.*no dropout; set it to 0.0 in"):
            attention.attend(query, key, value, segments, rate=0.1, keys=keys)


def test_cudnn_refuses_float32():
    query, key, value, segments, _ = qkv(128)
    moved = [jnp.swapaxes(x, 1, 2) for x in (query, key, value)]
    with pytest.raises(UserError, match="cudnn.*bfloat16"):
        attention.cudnn_attention(*moved, segments, segments)


def test_unknown_backend_names_the_known_ones():
    with (
        attention.backend("flash"),
        pytest.raises(UserError, match="xla, cpu, splash, rows, cudnn; got"),
    ):
        attention.chosen_backend()
