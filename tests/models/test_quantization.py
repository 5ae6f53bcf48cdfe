"""Layers multiply in 8 bits where they are asked to, near what they did, and nothing else does."""

import re
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from flaxpretrain.errors import UserError
from flaxpretrain.hardware import MATMULS
from flaxpretrain.models import quantization
from flaxpretrain.models.albert import AlbertConfig
from flaxpretrain.models.functional import (
    REMAT_POLICIES,
    Execution,
    cast,
    executing,
    model_of,
    multiplying,
)
from tests import toys
from tests.tolerances import EIGHT_BITS

pytest.importorskip("qwix")

EIGHTS = MATMULS[1:]
TYPES = {"int8": {"i8"}, "int8_forward": {"i8"}, "fp8": {"f8E4M3FN", "f8E5M2"}}
TYPES["fp8_forward"] = {"f8E4M3FN"}
ROWS, LENGTH = 4, 16


@pytest.fixture(autouse=True)
def promoted():
    """Qwix multiplies sums in int32 by scales, and relies on JAX's standard promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def in_a_layer(function, matmul):
    """The same function, traced as a layer is."""

    def traced(*arguments):
        with multiplying(matmul):
            return function(*arguments)

    return traced


def products(function, *arguments) -> Counter:
    """Types and shapes of both sides of all matrix products of a program."""
    text = jax.jit(function).lower(*arguments).as_text()
    return Counter(re.findall(r"dot_general.*: \(tensor<(\S+)>, tensor<(\S+)>\) ->", text))


def narrow(found: Counter) -> int:
    """How many products have 8 bits on both sides."""
    kinds = re.compile(r"x(i8|f8\w+)$")
    both = [bool(kinds.search(left)) + bool(kinds.search(right)) for left, right in found]
    assert 1 not in both, "a product of which one side alone is in 8 bits"
    return sum(count for sides, count in zip(both, found.values(), strict=True) if sides)


def apart(one, other) -> float:
    """Length of the difference over the length."""
    return float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))


FORMS = {
    "matmul": (quantization.matmul, (20, 24), (24, 40), lambda x, k: x @ k),
    "matmul of rows in parts": (quantization.matmul, (2, 10, 24), (24, 40), lambda x, k: x @ k),
} | {
    f"einsum {equation}": (
        lambda x, k, e=equation: quantization.einsum(e, x, k),
        x,
        kernel,
        lambda x, k, e=equation: jnp.einsum(e, x, k),
    )
    for equation, x, kernel in (
        ("BLD,nDHK->nBHLK", (2, 10, 24), (3, 24, 4, 5)),
        ("BLD,nDHK->nBLHK", (2, 10, 24), (3, 24, 4, 5)),
        ("BHLK,HKD->BLD", (2, 4, 10, 6), (4, 6, 24)),
    )
}


@pytest.mark.parametrize("matmul", EIGHTS)
@pytest.mark.parametrize("form", FORMS)
def test_products_and_their_gradients_are_near_those_of_float32(form, matmul):
    function, shape, kernel_shape, reference = FORMS[form]
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], kernel_shape)
    exact, back = jax.vjp(reference, x, kernel)
    near, near_back = jax.vjp(in_a_layer(function, matmul), x, kernel)
    toward = jax.random.normal(keys[2], exact.shape)
    assert near.dtype == exact.dtype and 0 < apart(near, exact) < EIGHT_BITS[matmul]
    for mine, other in zip(near_back(toward), back(toward), strict=True):
        assert mine.dtype == other.dtype and apart(mine, other) < EIGHT_BITS[matmul]
        assert (apart(mine, other) == 0) == matmul.endswith("_forward")


def test_outside_of_layers_products_are_what_they_were():
    x, kernel = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 16), jnp.bfloat16)
    with executing(Execution(matmul="int8")):
        assert not narrow(products(quantization.matmul, x, kernel))


MODELS = {
    "bert": (toys.bert(), 4),
    "albert": (
        AlbertConfig(
            vocab_size=300,
            embedding_size=16,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        ),
        4,
    ),
    "gpt2": (toys.gpt2(), 4),
    "t5": (toys.t5(), 4 + 7),
    "t5, gated": (toys.t5(feed_forward_proj="gated-gelu"), 5 + 8),
    "bart": (toys.bart(), 4 + 7),
}
"""Configurations, and a layer's products with parameters: of an encoder, and of a decoder."""


def loss(params, module_of, ids):
    """Of the logits of a network of any kind, over rows of one segment."""
    module, segments = module_of.bind(params), jnp.ones_like(ids)
    places = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
    hidden = module.embed(ids, segments, places)
    if hasattr(module, "decode_causally"):
        hidden = module.decode_causally(hidden, segments)
    elif hasattr(module, "encode"):
        hidden = module.encode(hidden, segments)
    if hasattr(module, "decode"):
        start = module.embed_decoder(ids, segments, places)
        hidden = module.decode(start, segments, hidden, segments)
    return jnp.mean(jnp.sin(module.logits(hidden)))


def gradient(name, compute=jnp.float32, **how):
    """The gradient of the loss by the parameters of a network, and parameters for it."""
    model = model_of(MODELS[name][0].build)
    ids = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 5, 300)

    def function(params):
        with executing(Execution(**how)):
            return loss(cast(params, compute), model, ids)

    return jax.grad(function), model.abstract()


@pytest.mark.parametrize("matmul", EIGHTS)
@pytest.mark.parametrize("name", MODELS)
def test_the_products_of_the_layers_and_no_others_are_in_8_bits(name, matmul):
    found = products(*gradient(name, compute=jnp.bfloat16, matmul=matmul))
    passes = 1 if matmul.endswith("_forward") else 3
    assert narrow(found) == passes * MODELS[name][1]
    inner = [side for pair in found for side in pair if not side.endswith(("f32", "bf16"))]
    assert {side.rsplit("x", 1)[1] for side in inner} == TYPES[matmul]
    # Neither the vocabulary, of 384 rows with its padding, nor scores between tokens.
    assert not [side for side in inner if "384" in side.split("x") or f"{LENGTH}x{LENGTH}" in side]


def test_a_network_without_the_option_has_none():
    assert not narrow(products(*gradient("bert")))


def kept(**how) -> list:
    """Shapes and types of what the backward pass of a network finds saved."""
    model = model_of(MODELS["bert"][0].build)
    ids = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 5, 300)

    def function(params):
        with executing(Execution(**how)):
            return loss(cast(params, jnp.bfloat16), model, ids)

    return jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(function, p)[1], model.abstract()))


def wide(leaves) -> list:
    """Sums of products in 32 bits; other whole numbers say where things lie."""
    return [leaf for leaf in leaves if leaf.dtype == jnp.int32 and leaf.size > ROWS * LENGTH]


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if "offload" not in name])
def test_policies_keep_no_sum_in_32_bits(remat):
    assert not wide(kept(matmul="int8", remat=remat))


@pytest.mark.parametrize("remat", ["dots", "dots_no_batch", "dots_save_attention"])
def test_policies_keep_as_many_products_as_of_wider_numbers(remat, monkeypatch):
    def bf16(leaves):
        return sum(leaf.size for leaf in leaves if leaf.dtype == jnp.bfloat16)

    assert bf16(kept(matmul="int8", remat=remat)) == bf16(kept(remat=remat))
    # JAX's own policies would keep the sums.
    monkeypatch.setitem(REMAT_POLICIES, remat, jax.checkpoint_policies.dots_saveable)
    assert wide(kept(matmul="int8", remat=remat))


def test_without_qwix_the_option_says_what_to_install(monkeypatch):
    quantization.library.cache_clear()
    monkeypatch.setitem(sys.modules, "qwix._src.core", None)
    with pytest.raises(UserError, match="need the package qwix: pip install"):
        quantization.library()
    quantization.library.cache_clear()
