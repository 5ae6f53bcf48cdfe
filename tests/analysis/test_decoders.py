"""Decoders and encoder-decoders compile for TPU slices that are not there, flash kernels too."""

import jax
import jax.numpy as jnp
import pytest

from flaxpretrain.analysis import topology
from flaxpretrain.config import Mesh, Phase, Precision
from flaxpretrain.models.functional import Execution, cast, executing, model_of
from flaxpretrain.objectives.causal_lm import CausalLM
from flaxpretrain.training import sharding
from flaxpretrain.training.state import TrainState
from tests import toys

pytestmark = pytest.mark.tpu

WIDE = dict(vocab_size=300, d_model=128)
MODELS = {
    "t5": toys.t5(
        **WIDE, num_heads=2, d_kv=64, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    ),
    "bart": toys.bart(**WIDE, encoder_attention_heads=2, decoder_attention_heads=2),
}


@pytest.fixture(scope="module")
def libtpu():
    """The compiler for TPUs, ready."""
    pytest.importorskip("libtpu")
    topology.prepare_environment()


def test_a_gpt2_step_with_causal_flash_attention_compiles_on_all_axes(libtpu):
    run = toys.run(
        model=toys.gpt2(n_embd=256, n_head=4, n_positions=256),
        objective=CausalLM(chunks=2, terms={"causal_lm": 1.0, "z_loss": 1e-4}),
        phases=(Phase(steps=1, length=256, batch_size=8),),
        mesh=Mesh(data=1, fsdp=2, tensor=2),
        precision=Precision(compute="bfloat16"),
        remat="dots",
    )
    report, text = topology.compile_step(run, "v5e:2x2", 0)
    assert report.fits, report.verdict
    assert report.attention == "rows" and text is not None
    assert "row_attention_forward" in text and "row_attention_backward" in text


@pytest.mark.parametrize("name", MODELS)
def test_an_encoder_decoder_and_its_gradients_compile_on_all_axes(libtpu, name):
    config = MODELS[name]
    model = model_of(config.build)
    mesh = sharding.make_mesh(1, 2, 2, devices=topology.devices_of("v5e:2x2"))
    nothing = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step=nothing, params=model.abstract(), opt_state=(), key=nothing)
    places = sharding.state_shardings(state, config.sharding, mesh).params
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state.params,
        places,
    )

    def loss(params, ids, target_ids):
        segments, targets = jnp.ones_like(ids), jnp.ones_like(target_ids)
        with executing(Execution(attention="splash", remat="dots")):
            module = model.bind(cast(params, jnp.bfloat16))
            encoded = module.encode(module.embed(ids, segments), segments)
            hidden = module.embed_decoder(target_ids, targets)
            hidden = module.decode(hidden, targets, encoded, segments)
            return jnp.mean(jax.nn.logsumexp(module.logits(hidden), axis=-1))

    rows = sharding.batch_sharding(mesh)
    ids, target_ids = (
        jax.ShapeDtypeStruct((4, length), jnp.int32, sharding=rows) for length in (64, 50)
    )
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(params, ids, target_ids).compile().as_text()
    # T5's attention within a row has a bias, which the kernel does not take.
    assert text.count("splash_mha_fwd") >= (1 if name == "t5" else 3)
