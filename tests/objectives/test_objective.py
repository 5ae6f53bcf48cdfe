"""Losses as sums with weights, against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.objectives.objective import (
    Sum,
    accuracy,
    cross_entropy,
    dropout_keys,
    gather_positions,
    perplexity,
)


def example(seed=0):
    """Logits [2, 3, 7], labels and weights."""
    generator = np.random.default_rng(seed)
    return (
        generator.normal(size=(2, 3, 7)).astype(np.float32) * 3,
        generator.integers(0, 7, (2, 3)),
        np.array([[1, 0, 1], [1, 1, 0]], np.float32),
    )


def test_cross_entropy_is_a_weighted_sum_of_nats():
    logits, labels, weights = example()
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nats = -np.log(np.take_along_axis(probabilities, labels[..., None], -1)[..., 0])
    total, weight = cross_entropy(jnp.array(logits), jnp.array(labels), jnp.array(weights))
    np.testing.assert_allclose(total, (nats * weights).sum(), rtol=1e-5)
    assert weight == weights.sum()


def test_a_weight_of_zero_silences_an_infinite_loss():
    logits = jnp.array([[0.0, -jnp.inf], [0.0, 0.0]])
    labels, weights = jnp.array([1, 0]), jnp.array([0.0, 1.0])
    value, gradient = jax.value_and_grad(lambda x: cross_entropy(x, labels, weights).total)(logits)
    assert np.isfinite(value)
    np.testing.assert_array_equal(gradient[0], [0, 0])


def test_accuracy_counts_the_largest_logit():
    logits, labels, weights = example()
    right = (logits.argmax(-1) == labels) * weights
    total, weight = accuracy(jnp.array(logits), jnp.array(labels), jnp.array(weights))
    assert (total, weight) == (right.sum(), weights.sum())


def test_positions_are_gathered_row_by_row():
    hidden = jnp.arange(24.0).reshape(2, 4, 3)
    positions = jnp.array([[3, 0], [1, 1]])
    expected = [[hidden[0, 3], hidden[0, 0]], [hidden[1, 1], hidden[1, 1]]]
    np.testing.assert_array_equal(gather_positions(hidden, positions), expected)


def test_dropout_keys_belong_to_the_row_not_to_its_place():
    noise = jnp.array([[1, 2], [3, 4], [5, 6]], jnp.uint32)
    keys = jax.random.key_data(dropout_keys(jax.random.key(0), noise))
    turned = jax.random.key_data(dropout_keys(jax.random.key(0), noise[::-1]))
    np.testing.assert_array_equal(keys, turned[::-1])
    assert len(np.unique(keys, axis=0)) == 3
    assert dropout_keys(None, noise) is None


@pytest.mark.parametrize(("nats", "expected"), [(0.0, 1.0), (1.0, np.e), (1e9, np.inf)])
def test_perplexity(nats, expected):
    assert perplexity(nats) == pytest.approx(expected)


def test_a_sum_is_a_pytree():
    doubled = jax.tree.map(lambda x: 2 * x, Sum(jnp.float32(1), jnp.float32(2)))
    assert (doubled.total, doubled.weight) == (2, 4)
