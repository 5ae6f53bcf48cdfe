"""GPT-2 is Transformers' for every option, causal within segments, and scans as it unrolls."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import Execution, executing, model_of
from flaxpretrain.models.gpt2 import GPT2Config
from flaxpretrain.models.names import flatten
from tests import toys
from tests.models.oracles import exported, loaded, random_network, rebuilt, tensors_of
from tests.tolerances import FLOPS_COUNTED, LOGITS_FLOAT32, REMAT_FLOAT32

TINY = dict(
    vocab_size=101, n_embd=24, n_layer=3, n_head=3, n_positions=19, bos_token_id=7, eos_token_id=7
)

GRID = {
    "plain": {},
    "activation": {"activation_function": "relu", "vocab_size": 128},
    "inner": {"n_inner": 7, "activation_function": "gelu", "vocab_size": 129},
    "inverse-layer": {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3},
    "upcast": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "unscaled": {"scale_attn_weights": False, "n_layer": 1, "n_head": 1},
    "untied": {"tie_word_embeddings": False, "n_head": 24},
    "padding-token": {"pad_token_id": 3, "activation_function": "silu"},
}

MODEL = model_of(toys.gpt2().build)
SEGMENTS = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0]])


def rows():
    generator = np.random.default_rng(1)
    ids = generator.integers(8, 101, (3, 17)).astype(np.int32)
    return ids, (np.arange(17) < np.array([[17], [11], [1]])).astype(np.int32)


def their_logits(network, ids, segments):
    import torch

    with torch.no_grad():
        out = network(
            input_ids=torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(segments)
        )
    return out[0].numpy()


def forward(config, params, ids, segments, prefix=None):
    module = model_of(config.build).bind(params)
    hidden = module.embed(jnp.asarray(ids), jnp.asarray(segments))
    hidden = module.decode_causally(hidden, jnp.asarray(segments), prefix=prefix)
    return module.logits(hidden) if config.heads else hidden


@pytest.mark.hf
@pytest.mark.parametrize("name", [*GRID, "bare"])
def test_logits_and_names_are_those_of_transformers_both_ways(name):
    bare = name == "bare"
    network = random_network("GPT2Model" if bare else "GPT2LMHeadModel", TINY | GRID.get(name, {}))
    config, params, notes = loaded(GPT2Config, network)
    assert config.heads == (() if bare else ("lm",))
    ids, segments = rows()
    real = segments > 0
    ours = np.asarray(jax.jit(forward, static_argnums=0)(config, params, ids, segments))
    theirs = their_logits(network, ids, segments)
    assert np.abs(theirs).max() > 0.05
    if not bare:
        assert np.all(ours[..., config.vocab_size :] < -1e29)
        ours = ours[..., : config.vocab_size]
    np.testing.assert_allclose(ours[real], theirs[real], rtol=0, atol=LOGITS_FLOAT32)

    before, after = tensors_of(network), exported(config, params)
    prefix = "transformer." if bare else ""
    tied = set() if bare or not config.tie_word_embeddings else {"lm_head.weight"}
    assert after.keys() == {prefix + name for name in before} - tied
    for tensor in before.keys() - tied:
        np.testing.assert_array_equal(after[prefix + tensor], before[tensor])
    if not bare:
        again, missing = rebuilt(network, config, params)
        again.tie_weights()
        assert set(missing) <= tied
        np.testing.assert_array_equal(their_logits(again, ids, segments), theirs)


@pytest.mark.hf
def test_a_packed_row_equals_transformers_rows_of_its_pieces():
    network = random_network("GPT2LMHeadModel", TINY)
    config, params, _ = loaded(GPT2Config, network)
    ids = rows()[0][:1, :12]
    logits = jax.jit(forward, static_argnums=0)(config, params, ids, SEGMENTS)[0, :, :101]
    for start, stop in ((0, 5), (5, 8), (8, 10)):
        alone = their_logits(network, ids[:, start:stop], np.ones((1, stop - start), np.int64))
        np.testing.assert_allclose(logits[start:stop], alone[0], rtol=0, atol=LOGITS_FLOAT32)


@pytest.mark.parametrize("prefix", [None, [[1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0]]])
def test_a_token_depends_on_those_before_it_in_its_piece_and_on_the_prefix_exactly(prefix):
    params = jax.tree.map(lambda x: 3 * x, MODEL.init(jax.random.key(0)))
    ids = jax.random.randint(jax.random.key(1), SEGMENTS.shape, 5, 300)
    embedded = MODEL.bind(params).embed(ids, SEGMENTS)
    prefix = None if prefix is None else jnp.array(prefix, bool)

    def scores(x):
        hidden = MODEL.bind(params).decode_causally(x, SEGMENTS, prefix=prefix)
        return hidden[0] @ jax.random.normal(jax.random.key(2), hidden.shape[-1:])

    reach = np.abs(np.asarray(jax.jit(jax.jacrev(scores))(embedded))[:, 0]).sum(axis=-1)
    i, j = np.indices(reach.shape)
    segments = np.asarray(SEGMENTS)[0]
    seen = segments[:, None] == segments
    seen &= (j <= i) if prefix is None else (j <= i) | np.asarray(prefix)[0]
    np.testing.assert_array_equal(reach > 0, seen)


def test_scanned_unrolled_and_rematerialised_layers_are_the_same():
    config = toys.gpt2(scale_attn_by_inverse_layer_idx=True)
    params = model_of(config.build).init(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 12), 5, 300)
    segments = jnp.ones_like(ids)
    keys = jax.random.split(jax.random.key(2), 2)

    def run(**how):
        def loss(params):
            with executing(Execution(**how)):
                module = model_of(config.build).bind(params)
                hidden = module.embed(ids, segments, keys=keys)
                return jnp.mean(module.logits(module.decode_causally(hidden, segments, keys))[0, 0])

        return jax.jit(jax.value_and_grad(loss))(params)

    scanned = run()
    for other in (run(scan=False), run(remat="dots")):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=REMAT_FLOAT32),
            other,
            scanned,
        )


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_a_sharding_rule_of_its_rank(tied):
    config = toys.gpt2(tie_word_embeddings=tied)
    for path, leaf in flatten(model_of(config.build).abstract()):
        rule = next((r for r in config.sharding if re.search(r[0], path)), None)
        assert rule is not None and len(rule[1]) == leaf.ndim, path
        assert "layers" not in path or rule[1][0] is None


def test_flops_per_token_agree_with_the_count_of_an_unrolled_network():
    config = toys.gpt2(n_embd=128, n_layer=4, n_positions=128)
    rows, length = 2, 128
    ids = jnp.ones((rows, length), jnp.int32)
    model = model_of(config.build)

    def step(params):
        def loss(params):
            module = model.bind(params)
            hidden = module.decode_causally(module.embed(ids, ids), ids)
            return jnp.sum(jax.nn.logsumexp(module.logits(hidden), axis=-1))

        with executing(Execution(scan=False)):
            return jax.value_and_grad(loss)(params)

    counted = toys.product_flops(step, model.abstract())
    formula = rows * length * config.flops_per_token(length)
    # XLA multiplies the padded vocabulary, all scores and not half of them, and those twice.
    formula += 6 * rows * length * config.n_embd * (config.padded_vocab_size - config.vocab_size)
    formula += (6 + 2) * rows * config.n_layer * length**2 * config.n_embd
    assert abs(counted / formula - 1) < FLOPS_COUNTED, counted / formula


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 30}, r"GPT2Config.n_embd: expected a multiple of n_head \(4\), got 30"),
        ({"attn_pdrop": 1.0}, r"attn_pdrop: expected a number in \[0, 1\)"),
        ({"n_inner": 0}, "n_inner: expected a positive number"),
        ({"heads": ("mlm",)}, "heads: expected some of lm"),
        ({"activation_function": "gleu"}, "expected one of"),
    ],
)
def test_impossible_configurations_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        toys.gpt2(**changes)


def test_configurations_survive_the_way_there_and_back_with_what_is_null():
    changed = toys.gpt2(n_inner=7, bos_token_id=None, eos_token_id=4, tie_word_embeddings=False)
    for config in (GPT2Config(), changed, dataclasses.replace(changed, heads=())):
        assert GPT2Config.from_hf(config.to_hf()) == config


def test_cross_attention_is_refused():
    with pytest.raises(UserError, match="add_cross_attention is True"):
        GPT2Config.from_hf({"add_cross_attention": True})
