"""T5 and BART are Transformers' for every option; their decoders see what they may, exactly."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.errors import UserError
from flaxpretrain.models.bart import BartConfig
from flaxpretrain.models.functional import Execution, executing, model_of
from flaxpretrain.models.names import flatten
from flaxpretrain.models.t5 import T5Config
from tests import toys
from tests.models.oracles import exported, loaded, random_network, rebuilt, tensors_of, untie
from tests.tolerances import FLOPS_COUNTED, LOGITS_FLOAT32, REMAT_FLOAT32

T5_TINY = dict(
    vocab_size=101,
    d_model=24,
    d_kv=8,
    d_ff=40,
    num_layers=2,
    num_heads=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    decoder_start_token_id=0,
)
BART_TINY = dict(
    vocab_size=101,
    d_model=24,
    encoder_layers=2,
    encoder_ffn_dim=40,
    encoder_attention_heads=3,
    decoder_layers=2,
    decoder_ffn_dim=40,
    decoder_attention_heads=3,
    max_position_embeddings=23,
)
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

GRID = {
    "t5-v1_0": ("T5ForConditionalGeneration", {}),
    "t5-v1_1": ("T5ForConditionalGeneration", V1_1),
    "t5-v1_1-deep-decoder": ("T5ForConditionalGeneration", V1_1 | {"num_decoder_layers": 3}),
    "t5-gelu-128": ("T5ForConditionalGeneration", {"feed_forward_proj": "gelu", "vocab_size": 128}),
    "t5-gated-silu-129": (
        "T5ForConditionalGeneration",
        V1_1 | {"feed_forward_proj": "gated-silu", "vocab_size": 129},
    ),
    "t5-sizes": (
        "T5ForConditionalGeneration",
        {"d_kv": 5, "num_heads": 7, "layer_norm_epsilon": 1e-3, "num_layers": 1},
    ),
    "t5-buckets": (
        "T5ForConditionalGeneration",
        {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 100},
    ),
    # A smaller table: unscaled logits of one that starts at 1 have rounding errors of their size.
    "t5-tied-unscaled": (
        "T5ForConditionalGeneration",
        {"scale_decoder_outputs": False, "initializer_factor": 0.3},
    ),
    "t5-bare": ("T5Model", {}),
    "bart": ("BartForConditionalGeneration", {}),
    "bart-scaled-128": (
        "BartForConditionalGeneration",
        {"scale_embedding": True, "vocab_size": 128, "activation_function": "relu"},
    ),
    "bart-lopsided-129": (
        "BartForConditionalGeneration",
        {
            "vocab_size": 129,
            "encoder_layers": 1,
            "decoder_ffn_dim": 9,
            "encoder_attention_heads": 1,
            "decoder_attention_heads": 12,
        },
    ),
    "bart-chinese": (
        "BartForConditionalGeneration",
        {
            "pad_token_id": 0,
            "bos_token_id": 3,
            "eos_token_id": 4,
            "decoder_start_token_id": 4,
            "forced_eos_token_id": 4,
        },
    ),
    "bart-bare": ("BartModel", {}),
}
CONFIGS = {"t5": T5Config, "bart": BartConfig}
TOYS = {"t5": toys.t5(), "t5-v1_1": toys.t5(**V1_1), "bart": toys.bart()}

SOURCE = jnp.array([[1, 1, 1, 1, 2, 2, 3, 3, 3, 0]])
TARGET = jnp.array([[1, 1, 2, 2, 2, 3, 0, 0]])


def rows():
    """Source and target ids and segments, padded on the right."""
    generator = np.random.default_rng(1)
    found = []
    for length, real in ((23, (23, 14, 1)), (17, (17, 5, 1))):
        ids = generator.integers(5, 101, (3, length)).astype(np.int32)
        found += [ids, (np.arange(length) < np.array(real)[:, None]).astype(np.int32)]
    return found


def their_outputs(network, ids, segments, target_ids, target_segments):
    import torch

    with torch.no_grad():
        return network(
            input_ids=torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.tensor(segments),
            decoder_input_ids=torch.tensor(target_ids, dtype=torch.long),
            decoder_attention_mask=torch.tensor(target_segments),
        )


def forward(config, params, ids, segments, target_ids, target_segments, keys=None):
    module = model_of(config.build).bind(params)
    encoded = module.encode(module.embed(ids, segments, keys=keys), segments, keys)
    hidden = module.embed_decoder(target_ids, target_segments, keys=keys)
    hidden = module.decode(hidden, target_segments, encoded, segments, keys)
    return encoded, module.logits(hidden) if config.heads else hidden


@pytest.mark.hf
@pytest.mark.parametrize("name", GRID)
def test_logits_and_names_are_those_of_transformers_both_ways(name):
    class_name, options = GRID[name]
    family = name.split("-")[0]
    network = random_network(class_name, (T5_TINY if family == "t5" else BART_TINY) | options)
    untied = not options.get("tie_word_embeddings", True)
    if untied:
        untie(network)
    config, params, _ = loaded(CONFIGS[family], network)
    assert bool(config.heads) == ("bare" not in name)
    if family == "t5":
        assert config.tie_word_embeddings != untied or not config.heads
    batch = rows()
    real, target_real = batch[1] > 0, batch[3] > 0
    theirs = their_outputs(network, *batch)
    encoded, ours = jax.jit(forward, static_argnums=0)(config, params, *map(jnp.asarray, batch))
    output = (theirs.logits if config.heads else theirs.last_hidden_state).numpy()
    assert np.abs(output).max() > 0.05
    if config.heads:
        assert np.all(ours[..., config.vocab_size :] < -1e29)
        ours = ours[..., : config.vocab_size]
    for mine, reference, where in (
        (encoded, theirs.encoder_last_hidden_state.numpy(), real),
        (ours, output, target_real),
    ):
        np.testing.assert_allclose(
            np.asarray(mine)[where], reference[where], rtol=0, atol=LOGITS_FLOAT32
        )

    before, after = tensors_of(network), exported(config, params)
    tied = {n for n in before if n.endswith("embed_tokens.weight")}
    tied |= set() if untied else {"lm_head.weight"} & before.keys()
    assert after.keys() == before.keys() - tied
    for tensor, value in after.items():
        np.testing.assert_array_equal(value, before[tensor])
    again, missing = rebuilt(network, config, params)
    assert set(missing) <= tied
    found = their_outputs(again, *batch)
    np.testing.assert_array_equal(found[0].numpy(), theirs[0].numpy())


@pytest.mark.parametrize("name", ["t5-v1_1", "bart"])
def test_tokens_see_what_they_may_and_nothing_else_exactly(name):
    model = model_of(TOYS[name].build)
    params = jax.tree.map(lambda x: x if x.ndim < 3 else 2 * x, model.init(jax.random.key(0)))
    module = model.bind(params)
    ids = jax.random.randint(jax.random.key(1), (1, 18), 5, 300)
    source = module.embed(ids[:, :10], SOURCE)
    target = module.embed_decoder(ids[:, 10:], TARGET)
    toward = jax.random.normal(jax.random.key(2), source.shape[-1:])

    def scores(source, target):
        module = model.bind(params)
        encoded = module.encode(source, SOURCE)
        return encoded[0] @ toward, module.decode(target, TARGET, encoded, SOURCE)[0] @ toward

    (within, _), (cross, down) = jax.jit(jax.jacrev(scores, argnums=(0, 1)))(source, target)
    segments, target_segments = np.asarray(SOURCE)[0], np.asarray(TARGET)[0]
    i, j = np.indices((8, 8))
    for jacobian, seen in (
        (within, segments[:, None] == segments),
        (cross, target_segments[:, None] == segments),
        (down, (target_segments[:, None] == target_segments) & (j <= i)),
    ):
        reach = np.abs(np.asarray(jacobian)[:, 0]).sum(axis=-1)
        np.testing.assert_array_equal(reach > 0, seen)


@pytest.mark.parametrize("name", ["t5-v1_1", "bart"])
def test_a_packed_row_equals_its_pairs_alone(name):
    params = model_of(TOYS[name].build).init(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (1, 18), 5, 300)
    run = jax.jit(forward, static_argnums=0)
    _, packed = run(TOYS[name], params, ids[:, :10], SOURCE, ids[:, 10:], TARGET)
    for segment, (start, stop), (first, last) in ((1, (0, 4), (0, 2)), (2, (4, 6), (2, 5))):
        ones = jnp.ones((1, 8), jnp.int32)
        _, alone = run(
            TOYS[name],
            params,
            ids[:, start:stop],
            ones[:, : stop - start],
            ids[:, 10 + first : 10 + last],
            ones[:, : last - first],
        )
        assert segment == TARGET[0, first] == SOURCE[0, start]
        np.testing.assert_allclose(packed[:, first:last], alone, rtol=0, atol=LOGITS_FLOAT32)


@pytest.mark.parametrize("name", ["t5-v1_1", "bart"])
def test_unrolled_and_rematerialised_layers_with_dropout_are_the_scanned_ones(name):
    config = TOYS[name]
    params = model_of(config.build).init(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 6), 5, 300)
    ones = jnp.ones_like(ids)
    keys = jax.random.split(jax.random.key(2), 2)

    def run(**how):
        def loss(params):
            with executing(Execution(**how)):
                logits = forward(config, params, ids, ones, ids, ones, keys)[1]
                return jnp.mean(jax.nn.logsumexp(logits, axis=-1)) / 10

        return jax.jit(jax.value_and_grad(loss))(params)

    scanned = run()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=REMAT_FLOAT32),
        run(scan=False, remat="dots"),
        scanned,
    )
    if name == "bart":
        assert np.all(np.asarray(scanned[1]["lm_head"]["bias"]) == 0), "a constant has no gradient"


@pytest.mark.parametrize("name", TOYS)
def test_every_parameter_has_a_sharding_rule_of_its_rank(name):
    config = TOYS[name]
    for path, leaf in flatten(model_of(config.build).abstract()):
        rule = next((r for r in config.sharding if re.search(r[0], path)), None)
        assert rule is not None and len(rule[1]) == leaf.ndim, path
        assert "layers" not in path or rule[1][0] is None


@pytest.mark.parametrize("name", ["t5-v1_1", "bart"])
def test_flops_of_a_row_agree_with_the_count_of_an_unrolled_network(name):
    wide = (
        dict(d_model=128, d_ff=256, d_kv=16, num_heads=8)
        if name == "t5-v1_1"
        else dict(d_model=128, encoder_ffn_dim=256, decoder_ffn_dim=512)
    )
    config = dataclasses.replace(TOYS[name], **wide)
    source, target = 64, 48
    model = model_of(config.build)
    ones = jnp.ones((2, source), jnp.int32)

    def step(params):
        def loss(params):
            logits = forward(config, params, ones, ones, ones[:, :target], ones[:, :target])[1]
            return jnp.sum(jax.nn.logsumexp(logits, axis=-1))

        with executing(Execution(scan=False)):
            return jax.value_and_grad(loss)(params)

    counted = toys.product_flops(step, model.abstract()) / 2
    formula = config.flops_per_row(source, target)
    # XLA multiplies the padded vocabulary and both halves of causal scores, and all scores twice.
    layers, width = 2, 128
    formula += 6 * target * width * (config.padded_vocab_size - config.vocab_size)
    formula += 6 * layers * target**2 * width
    formula += 2 * layers * width * (source**2 + target**2 + source * target)
    assert abs(counted / formula - 1) < FLOPS_COUNTED, counted / formula


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (toys.t5, {"feed_forward_proj": "gated-relu-x"}, "feed_forward_proj: expected an activat"),
        (toys.t5, {"feed_forward_proj": "rely"}, "expected one of"),
        (toys.t5, {"relative_attention_num_buckets": 5}, "expected an even number of 4 or more"),
        (toys.t5, {"relative_attention_max_distance": 4}, "more than half of the 8 buckets"),
        (toys.t5, {"dropout_rate": 1.0}, r"dropout_rate: expected a number in \[0, 1\)"),
        (toys.bart, {"d_model": 30}, r"d_model: expected a multiple of encoder_attention_heads"),
        (toys.bart, {"decoder_layers": 0}, "decoder_layers: expected a positive number"),
        (toys.bart, {"heads": ("mlm",)}, "heads: expected some of lm"),
    ],
)
def test_impossible_configurations_are_named(make, changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    "config",
    [*TOYS.values(), T5Config(num_decoder_layers=2, scale_decoder_outputs=False), BartConfig()],
)
def test_configurations_survive_the_way_there_and_back(config):
    assert type(config).from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        (T5Config, {"is_encoder_decoder": False}),
        (BartConfig, {"normalize_before": True}),
        (BartConfig, {"tie_word_embeddings": False}),
        (BartConfig, {"encoder_layerdrop": 0.1}),
    ],
)
def test_options_that_cannot_be_represented_are_refused(kind, option):
    with pytest.raises(UserError, match=f"config.json: {next(iter(option))} is"):
        kind.from_hf(option)
