"""Models as functions: init, abstract, bind; stacks scanned, unrolled and rematerialised."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxpretrain.errors import UserError
from flaxpretrain.models import functional
from flaxpretrain.models.functional import REMAT_POLICIES, Execution, executing, model_of
from tests import toys
from tests.tolerances import REMAT_FLOAT32

CONFIG = toys.bert(num_hidden_layers=3)
MODEL = model_of(CONFIG.build)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def inputs():
    ids = jax.random.randint(jax.random.key(1), (4, 16), 5, 300)
    segments = jnp.where(jnp.arange(16)[None] < jnp.array([[16], [9], [3], [0]]), 1, 0)
    return ids, segments, jnp.broadcast_to(jnp.arange(16)[None], (4, 16))


def loss(params, inputs, keys, encode):
    ids, segments, positions = inputs
    module = MODEL.bind(params)
    hidden = encode(module, module.embed(ids, segments, positions, keys=keys), segments, keys)
    return jnp.mean(jnp.sin(hidden))


def by_scan(module, hidden, segments, keys):
    return module.encode(hidden, segments, keys)


def by_loop(module, hidden, segments, keys):
    for number in range(CONFIG.num_hidden_layers):
        layer = functional.layer(module.encoder.layers, number)
        hidden = layer(hidden, segments, functional.fold(keys, number))
    return hidden


@pytest.fixture(scope="module")
def plain(params, inputs):
    keys = jax.random.split(jax.random.key(2), 4)
    return jax.jit(jax.value_and_grad(loss), static_argnums=3)(params, inputs, keys, by_loop)


def check_like_a_plain_loop(execution, params, inputs, plain):
    def run(params, keys):
        with executing(execution):
            return jax.value_and_grad(loss)(params, inputs, keys, by_scan)

    result = jax.jit(run)(params, jax.random.split(jax.random.key(2), 4))
    for mine, reference in zip(jax.tree.leaves(result), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(mine, reference, rtol=REMAT_FLOAT32, atol=REMAT_FLOAT32)


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_scan_and_remat_equal_a_plain_loop(params, inputs, plain, remat, scan):
    check_like_a_plain_loop(Execution(remat=remat, scan=scan), params, inputs, plain)


def test_unrolled_for_a_cpu_it_is_the_same(params, inputs, plain):
    check_like_a_plain_loop(Execution(scan=False, platform="cpu"), params, inputs, plain)


def additions(layers):
    """How many elementwise additions a compiled, unrolled network of so many layers has."""
    model = functional.model_of(dataclasses.replace(CONFIG, num_hidden_layers=layers).build)
    ids = jnp.ones((2, 16), jnp.int32)

    def encoded(params):
        module = model.bind(params)
        with executing(Execution(scan=False, platform="cpu")):
            return module.encode(module.embed(ids, ids, ids), ids)

    text = jax.jit(encoded).lower(model.abstract()).compile().as_text()
    return len(re.findall(r"f32\[\S+ add\(", text))


@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="older XLA:CPU fuses over optimization barriers"
)
def test_unrolled_for_a_cpu_no_layer_computes_the_sums_of_those_before_again():
    two, four, six = (additions(layers) for layers in (2, 4, 6))
    assert six - four == four - two, (two, four, six)


def test_a_range_of_layers_can_be_scanned(params, inputs):
    module = MODEL.bind(params)
    hidden = module.embed(*inputs)
    segments = inputs[1]

    def apply(layer, x, keys):
        return layer(x, segments, keys)

    halves = functional.scan(module.encoder.layers, apply, hidden, stop=1)
    halves = functional.scan(module.encoder.layers, apply, halves, start=1)
    whole = module.encode(hidden, segments)
    np.testing.assert_allclose(halves, whole, rtol=REMAT_FLOAT32, atol=REMAT_FLOAT32)


def test_abstract_is_what_init_makes_without_allocating(params):
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert described == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), MODEL.abstract())
    leaves = jax.tree.leaves(MODEL.abstract())
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_parameters_are_plain_dicts_and_bind_returns_them(params):
    assert type(params) is dict
    state = nnx.to_pure_dict(nnx.split(MODEL.bind(params))[1])
    assert jax.tree.structure(state) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(params), strict=True))


def test_init_depends_on_the_key_alone(params):
    again = MODEL.init(jax.random.key(0))
    other = MODEL.init(jax.random.key(1))
    kernel = ("encoder", "layers", "feed_forward", "up", "kernel")

    def at(tree):
        for name in kernel:
            tree = tree[name]
        return np.asarray(tree)

    np.testing.assert_array_equal(at(params), at(again))
    assert not np.array_equal(at(params), at(other))
    assert len({at(params)[i].tobytes() for i in range(3)}) == 3, "layers must differ"


def test_initial_spread_is_that_of_a_normal_cut_at_two_deviations():
    wide = model_of(toys.bert(hidden_size=256, intermediate_size=1024).build)
    kernel = wide.init(jax.random.key(0))["encoder"]["layers"]["feed_forward"]["up"]["kernel"]
    assert abs(float(jnp.std(kernel)) / (0.02 * 0.8796) - 1) < 0.01
    assert float(jnp.max(jnp.abs(kernel))) <= 0.04


def test_cast_leaves_norms_in_float32(params):
    cast = functional.cast(params, jnp.bfloat16)
    flat = jax.tree_util.tree_leaves_with_path(cast)
    for path, leaf in flat:
        names = [entry.key for entry in path]
        expected = jnp.float32 if any(n.endswith("norm") for n in names) else jnp.bfloat16
        assert leaf.dtype == expected, names


def test_unknown_remat_policy_names_the_known_ones():
    with pytest.raises(UserError, match="remat: expected one of none, full, dots.*got 'some'"):
        Execution(remat="some")


def test_execution_ends_with_its_block():
    before = functional.execution()
    with executing(dataclasses.replace(before, remat="full")):
        assert functional.execution().remat == "full"
    assert functional.execution() == before
