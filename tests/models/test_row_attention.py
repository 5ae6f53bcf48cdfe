"""The kernels of TPUs: whole rows equal plain attention, and every kind compiles for every TPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.analysis import hlo, topology
from flaxpretrain.models.attention import Attention, splash_attention, xla_attention
from flaxpretrain.models.blocks import BLOCKS, blocks
from flaxpretrain.models.functional import Execution, executing, model_of
from flaxpretrain.models.row_attention import row_attention, side_by_side, takes
from flaxpretrain.training import sharding
from tests.tolerances import FLASH_FLOAT32

KINDS = {
    "whole": {},
    "causal": {"causal": True},
    "window": {"window": 100},
    "causal-window": {"causal": True, "window": 30},
}


def in_pieces(rows, length):
    """Segments of `rows` rows: two pieces and some padding."""
    bounds = jnp.arange(1, rows + 1)[:, None] * length // (rows + 1)
    return jnp.where(jnp.arange(length)[None] < bounds, 1, 2).at[0, -5:].set(0)


def to_heads(x, size):
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, size), 2, 1)


@pytest.mark.parametrize(
    ("kind", "length", "key_length", "size"),
    [
        ("whole", 128, 128, 64),
        ("whole", 70, 300, 64),
        ("causal", 200, 200, 32),
        ("causal", 640, 640, 128),
        ("window", 640, 640, 64),
        ("causal-window", 200, 200, 64),
    ],
)
def test_whole_rows_equal_xla_in_values_and_gradients(kind, length, key_length, size):
    keys = jax.random.split(jax.random.key(0), 4)
    query, toward = (jax.random.normal(key, (2, length, 128)) for key in keys[:2])
    key, value = (jax.random.normal(key, (2, key_length, 128)) for key in keys[2:])
    query /= 8
    segments, key_segments = in_pieces(2, length), in_pieces(2, key_length)

    def along(context):
        return jnp.sum(jnp.where((segments > 0)[..., None], context * toward, 0.0))

    def mine(query, key, value):
        packed = (
            (side_by_side((query, key, value)),)
            if length == key_length
            else (query, side_by_side((key, value)))
        )
        return along(
            row_attention(packed, segments, key_segments, size=size, interpret=True, **KINDS[kind])
        )

    def plain(*qkv):
        heads = (to_heads(x, size) for x in qkv)
        context = xla_attention(*heads, segments, key_segments, **KINDS[kind])
        return along(jnp.moveaxis(context, 1, 2).reshape(toward.shape))

    found, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(query, key, value) for f in (mine, plain)
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for mine, reference in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(mine, reference, rtol=0, atol=FLASH_FLOAT32)


def test_blocks_of_the_projections_lie_side_by_side():
    parts = [jnp.full((2, 256), number) for number in (1.0, 2.0, 3.0)]
    joined = side_by_side(parts)
    np.testing.assert_array_equal(joined[0, ::128], [1, 2, 3, 1, 2, 3])


@pytest.mark.parametrize(
    ("heads", "size", "length", "taken"),
    [(12, 64, 512, True), (16, 64, 1024, True), (4, 32, 64, True), (12, 64, 2048, False),
     (2, 32, 128, False), (4, 80, 128, False), (2, 256, 128, False)],
)  # fmt: skip
def test_shapes_that_the_kernel_takes(heads, size, length, taken):
    assert takes(heads, size, length, length) == taken


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_kernels_compile_for_every_kind_of_mask(name):
    """Both kernels with segments, forward and backward, in one program a TPU."""
    pytest.importorskip("libtpu")
    topology.prepare_environment()
    mesh = sharding.make_mesh(1, 1, 1, devices=topology.devices_of(name)[:1])
    place = sharding.batch_sharding(mesh)

    def everything(packed, segments, long):
        total = jnp.float32(0)
        query, key, value = (to_heads(x, 64) for x in jnp.split(long, 3, axis=-1))
        ids = jnp.ones(long.shape[:2], jnp.int32)
        for kind in KINDS.values():
            for context in (
                row_attention((packed,), segments, segments, size=64, **kind),
                splash_attention(query, key, value, ids, ids, **kind),
            ):
                total += jnp.sum(context.astype(jnp.float32))
        return total

    packed, long = (
        jax.ShapeDtypeStruct((1, length, 384), jnp.bfloat16, sharding=place)
        for length in (256, 2048)
    )
    segments = jax.ShapeDtypeStruct((1, 256), jnp.int32, sharding=place)
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(everything, argnums=(0, 2))).lower(packed, segments, long)
        sums = hlo.totals(hlo.parse(lowered.compile().as_text()))
    calls = {
        part: sum(count for kernel, count in sums.kernel_calls.items() if part in kernel)
        for part in ("row_attention_forward", "row_attention_backward", "_fwd", "_dkv")
    }
    assert calls["row_attention_backward"] == calls["_fwd"] == calls["_dkv"] == len(KINDS), calls
    assert not sums.notes
    assert set(sums.head_sizes.values()) == {64}


def test_every_tpu_has_its_line_in_the_table_of_blocks():
    kinds = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")
    for kind in kinds:
        assert any(re.search(pattern, kind) for pattern, _ in BLOCKS), kind
    for _, sizes in BLOCKS:
        assert sizes.splash % 128 == 0 and sizes.scores % 128**2 == 0


@pytest.mark.tpu
def test_the_mesh_says_which_line():
    pytest.importorskip("libtpu")
    topology.prepare_environment()
    found = {}
    for name in ("v5e:2x2", "v6e:2x2"):
        mesh = sharding.make_mesh(1, 2, 2, devices=topology.devices_of(name))
        with jax.set_mesh(mesh):
            found[name] = blocks().splash
    assert found == {"v5e:2x2": 512, "v6e:2x2": 1024}


@pytest.mark.tpu
def test_attention_by_rows_compiles_on_all_axes_and_falls_back_to_splash():
    pytest.importorskip("libtpu")
    topology.prepare_environment()
    mesh = sharding.make_mesh(1, 2, 2, devices=topology.devices_of("v5e:2x2"))
    rows = sharding.batch_sharding(mesh)

    def kernels(heads, causal):
        model = model_of(
            lambda rngs: Attention(256, heads, rngs, stddev=0.1, dropout_rate=0.0, causal=causal)
        )

        def loss(params, x, segments):
            with executing(Execution(attention="rows")):
                return jnp.sum(model.bind(params)(x, segments))

        x = jax.ShapeDtypeStruct((4, 128, 256), jnp.float32, sharding=rows)
        segments = jax.ShapeDtypeStruct((4, 128), jnp.int32, sharding=rows)
        with jax.set_mesh(mesh):
            step = jax.jit(jax.grad(loss)).lower(model.abstract(), x, segments).compile()
        return step.as_text()

    assert "row_attention_backward" in kernels(4, causal=True)
    assert "splash_mha_dkv" in kernels(1, causal=False)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("tensor", "kernel"),
    # Four heads of 64 are two blocks: two devices get one each, four get a head of splash each.
    [(2, "row_attention_forward"), (4, "splash_mha")],
)
def test_a_device_gets_blocks_of_heads_or_single_heads_never_those_of_others(tensor, kernel):
    pytest.importorskip("libtpu")
    topology.prepare_environment()
    mesh = sharding.make_mesh(-1, 1, tensor, devices=topology.devices_of("v5e:2x2"))
    model = model_of(lambda rngs: Attention(256, 4, rngs, stddev=0.1, dropout_rate=0.0))

    def forward(params, x, segments):
        with executing(Execution(attention="rows")):
            return model.bind(params)(x, segments)

    x, segments = jnp.zeros((4, 128, 256)), jnp.ones((4, 128), jnp.int32)
    with jax.set_mesh(mesh):
        traced = str(jax.make_jaxpr(forward)(model.abstract(), x, segments))
    assert kernel in traced
    assert ("row_attention" in traced) == (tensor == 2)
