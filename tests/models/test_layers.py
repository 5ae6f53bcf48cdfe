"""Dropout from the row's key alone, norms in float32, activations by name, positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import Execution, executing
from flaxpretrain.models.layers import (
    LayerNorm,
    activation,
    dropout,
    place_of_largest,
    row_bits,
    sinusoidal,
)
from flaxpretrain.models.positions import restarting

KEYS = jax.random.split(jax.random.key(0), 64)


def test_bits_are_uniform_and_unrelated_between_rows_places_and_keys():
    words = np.asarray(row_bits(KEYS, (64, 100, 41)))
    uniform = words / 2.0**32
    count = uniform.size
    assert abs(uniform.mean() - 0.5) < 4 / np.sqrt(12 * count)
    for bit in range(32):
        assert abs(((words >> bit) & 1).mean() - 0.5) < 4 * 0.5 / np.sqrt(count), bit
    flat = uniform.reshape(64, -1) - 0.5
    rows = np.corrcoef(flat)
    assert np.abs(rows - np.eye(64)).max() < 5 / np.sqrt(flat.shape[1])
    for lag in (1, 2, 3, 41, 64, 128, 1024):
        serial = (flat[:, lag:] * flat[:, :-lag]).mean() * 12
        assert abs(serial) < 4 / np.sqrt(count), lag
    folded = row_bits(jax.vmap(jax.random.fold_in, (0, None))(KEYS, 1), (64, 100, 41))
    assert abs(((np.asarray(folded) / 2.0**32).reshape(64, -1) - 0.5).ravel() @ flat.ravel()) < (
        4 * np.sqrt(count) / 12
    )


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_dropout_zeroes_its_share_and_keeps_the_mean(rate):
    out = np.asarray(dropout(jnp.ones((64, 50, 40)), rate, KEYS))
    share = (out == 0).mean()
    assert abs(share - rate) < 4 * np.sqrt(rate * (1 - rate) / out.size)
    np.testing.assert_allclose(out[out > 0], 1 / (1 - rate), rtol=1e-6)


def test_no_keys_or_no_rate_is_no_dropout():
    x = jnp.ones((64, 3))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, KEYS) is x


def test_dropout_is_the_same_in_any_split_of_the_batch_and_on_any_mesh():
    x = jnp.ones((64, 6, 16))
    whole = dropout(x, 0.3, KEYS)
    parts = [dropout(x[i : i + 16], 0.3, KEYS[i : i + 16]) for i in range(0, 64, 16)]
    np.testing.assert_array_equal(whole, jnp.concatenate(parts))

    types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=types)
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            lambda x, keys: dropout(x, 0.3, keys),
            in_specs=(P("data"), P("data")),
            out_specs=P("data"),
            axis_names={"data"},
        )
        np.testing.assert_array_equal(whole, jax.jit(mapped)(x, KEYS))
        placed = jax.device_put(x, jax.NamedSharding(mesh, P("data", None, "fsdp")))
        np.testing.assert_array_equal(whole, jax.jit(dropout, static_argnums=1)(placed, 0.3, KEYS))


def test_the_gradient_of_dropout_is_its_mask():
    x = jnp.arange(64.0 * 5).reshape(64, 5) + 1
    out, vjp = jax.vjp(lambda x: dropout(x, 0.4, KEYS), x)
    np.testing.assert_allclose(vjp(jnp.ones_like(x))[0] * x, out, rtol=1e-6)


def places_on(platform, scores):
    with executing(Execution(platform=platform)):
        return np.asarray(jax.jit(place_of_largest)(scores))


@pytest.mark.parametrize("platform", [None, "cpu", "tpu"])
def test_the_place_of_the_largest_is_the_first_of_equals(platform):
    draw = np.random.default_rng(0)
    for scores in (
        draw.integers(0, 5, (40, 3, 17)).astype(np.float32),  # many ties
        draw.standard_normal((40, 3, 17), np.float32),
        np.full((2, 3), -np.inf, np.float32),
    ):
        np.testing.assert_array_equal(places_on(platform, scores), scores.argmax(-1))


@pytest.mark.parametrize("platform", [None, "cpu"])
def test_the_place_of_the_largest_is_a_place_even_where_there_is_none(platform):
    scores = np.array([[1.0, np.nan, 2.0], [np.nan] * 3], np.float32)
    places = places_on(platform, scores)
    assert ((places >= 0) & (places < 3)).all()


def test_no_gradient_passes_through_the_place_of_the_largest():
    def chosen(scores):
        with executing(Execution(platform="cpu")):
            return jnp.sum(place_of_largest(scores).astype(float) + scores[:, 0])

    gradient = jax.grad(chosen)(jnp.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(gradient, [[1, 0, 0], [1, 0, 0]])


def test_norm_computes_in_float32_and_answers_in_kind():
    norm = LayerNorm(64, epsilon=1e-12)
    x = 300 + jax.random.normal(jax.random.key(0), (4, 64))
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    np.testing.assert_allclose(norm(x), expected, atol=2e-4)
    rounded = norm(x.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    assert norm.scale[...].dtype == jnp.float32


def test_unknown_activation_names_the_known_ones():
    with pytest.raises(UserError, match="hidden_act: expected one of gelu, .*got 'geluu'"):
        activation("geluu")


def test_positions_restart_with_every_piece():
    segments = [[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2]]
    expected = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    np.testing.assert_array_equal(restarting(jnp.array(segments)), expected)


def test_a_sinusoidal_table_has_the_asked_deviation_and_knows_distances():
    table = np.asarray(sinusoidal(nnx.Rngs(0), (64, 128), 0.08)[...])
    assert np.sqrt((table**2).mean()) == pytest.approx(0.08, rel=1e-3)
    products = table @ table.T
    for distance in (1, 5, 20):
        line = np.diagonal(products, distance)
        np.testing.assert_allclose(line, line[0], rtol=1e-4)
    assert np.all(np.diff(products[0, :4]) < 0)
