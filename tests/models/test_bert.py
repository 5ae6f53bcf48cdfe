"""BERT's and RoBERTa's configurations, heads, padded vocabulary, sharding rules and FLOPs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.errors import UserError
from flaxpretrain.models.bert import BertConfig
from flaxpretrain.models.functional import Execution, cast, executing, model_of
from flaxpretrain.models.names import flatten
from flaxpretrain.models.positions import restarting
from flaxpretrain.models.roberta import RobertaConfig
from tests import toys
from tests.tolerances import FLOPS_COUNTED

IDS = jax.random.randint(jax.random.key(1), (2, 16), 5, 300)
ONES = jnp.ones((2, 16), jnp.int32)


def forward(config, params, keys=None):
    module = model_of(config.build).bind(params)
    hidden = module.embed(IDS, ONES, restarting(ONES), keys=keys)
    return module, module.encode(hidden, ONES, keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, "BertConfig.hidden_size: expected a multiple of num_attention_heads"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob: expected a number in \[0, 1\)"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a positive number, got 0"),
        ({"heads": ("nsp",)}, "heads: expected 'pooler' beside 'nsp'"),
        ({"heads": ("lm",)}, "heads: expected some of mlm, nsp, pooler"),
        ({"hidden_act": "gleu"}, "hidden_act: expected one of"),
    ],
)
def test_impossible_configurations_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        toys.bert(**changes)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("position_embedding_type", "relative_key"),
        ("pruned_heads", {"1": [0]}),
    ],
)
def test_options_that_cannot_be_represented_are_refused(option, value):
    with pytest.raises(UserError, match=f"config.json: {option} is"):
        BertConfig.from_hf({option: value})


def test_an_unknown_architecture_is_refused_unless_the_heads_are_given():
    values = {"architectures": ["BertForTokenClassification"]}
    with pytest.raises(UserError, match="TokenClassification.*expected one of BertForMasked"):
        BertConfig.from_hf(values)
    assert BertConfig.from_hf(values, heads=("mlm",)) == BertConfig()


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(),
        toys.bert(heads=("mlm", "pooler", "nsp"), tie_word_embeddings=False, hidden_act="relu"),
        RobertaConfig(),
        RobertaConfig(heads=("pooler",), pad_token_id=3),
    ],
)
def test_configurations_survive_the_way_there_and_back(config):
    assert type(config).from_hf(config.to_hf()) == config


def test_roberta_has_rows_of_positions_to_spare():
    assert RobertaConfig().max_length == 512
    assert BertConfig().max_length == 512


def test_scaled_makes_the_generators_of_electra():
    small = toys.bert(hidden_size=256, num_attention_heads=4, intermediate_size=1024).scaled(1 / 4)
    base = BertConfig().scaled(1 / 3)
    widths = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
    assert [getattr(small, name) for name in widths] == [64, 1, 256, 2]
    assert [getattr(base, name) for name in widths] == [256, 4, 1024, 12]


def test_the_trunk_is_the_layers_alone():
    config = toys.bert()
    trunk = model_of(config.trunk).init(jax.random.key(0))
    whole = model_of(config.build).abstract()
    assert set(trunk) == {"layers"}
    assert jax.tree.map(jnp.shape, trunk) == jax.tree.map(lambda x: x.shape, whole["encoder"])
    hidden = model_of(config.trunk).bind(trunk)(jnp.ones((2, 16, 32)), ONES)
    assert hidden.shape == (2, 16, 32)


def test_heads_left_out_are_named_when_asked_for():
    config = toys.bert(heads=("pooler",))
    module, hidden = forward(config, model_of(config.build).init(jax.random.key(0)))
    with pytest.raises(UserError, match="model.heads: this objective needs 'mlm'"):
        module.logits(hidden)


@pytest.mark.parametrize("tied", [True, False])
def test_padded_vocabulary_is_never_predicted_and_never_trained(tied):
    config = toys.bert(tie_word_embeddings=tied)
    params = model_of(config.build).init(jax.random.key(0))

    def nats(params):
        module, hidden = forward(config, params)
        return jnp.mean(jax.nn.logsumexp(module.logits(hidden), axis=-1))

    module, hidden = forward(config, params)
    logits = module.logits(hidden)
    assert logits.shape[-1] == config.padded_vocab_size == 384
    assert np.all(jax.nn.softmax(logits)[..., 300:] == 0)
    assert np.isclose(nats(params), jnp.mean(jax.nn.logsumexp(logits[..., :300], axis=-1)))
    grads = jax.grad(nats)(params)
    head = grads["mlm_head"]
    pads = (
        [grads["embeddings"]["words"][300:], head["bias"][300:]]
        if tied
        else [head["decoder"]["kernel"][:, 300:], head["decoder"]["bias"][300:]]
    )
    assert all(np.all(np.asarray(pad) == 0) for pad in pads)


def test_bfloat16_flows_through_and_logits_are_float32():
    config = toys.bert(heads=("mlm", "pooler", "nsp"))
    params = cast(model_of(config.build).init(jax.random.key(0)), jnp.bfloat16)
    module, hidden = forward(config, params, jax.random.split(jax.random.key(0), 2))
    assert hidden.dtype == jnp.bfloat16
    assert module.logits(hidden).dtype == jnp.float32
    pooled = module.pool(hidden, jnp.zeros((2, 1), jnp.int32))
    assert pooled.dtype == jnp.bfloat16
    assert module.next_sentence_logits(pooled).shape == (2, 1, 2)


@pytest.mark.parametrize("config", [toys.bert(), RobertaConfig()])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_a_sharding_rule_of_its_rank(config, tied):
    heads = ("mlm", "pooler", "nsp") if isinstance(config, BertConfig) else ("mlm", "pooler")
    config = dataclasses.replace(config, heads=heads, tie_word_embeddings=tied)
    used = set()
    for path, leaf in flatten(model_of(config.build).abstract()):
        rule = next((r for r in config.sharding if re.search(r[0], path)), None)
        assert rule is not None and len(rule[1]) == leaf.ndim, path
        assert "layers" not in path or rule[1][0] is None, "the layer axis is never sharded"
        used.add(rule)
    unused = set(config.sharding) - used
    assert all("decoder" in pattern for pattern, _ in unused) if tied else True


def test_flops_per_token_agree_with_the_count_of_an_unrolled_network():
    config = toys.bert(
        hidden_size=128, num_hidden_layers=4, intermediate_size=512, max_position_embeddings=128
    )
    rows, length, slots = 2, 128, 20
    ids = jnp.ones((rows, length), jnp.int32)
    model = model_of(config.build)

    def loss(params):
        module = model.bind(params)
        hidden = module.encode(module.embed(ids, ids, restarting(ids)), ids)
        return jnp.sum(jax.nn.logsumexp(module.logits(hidden[:, :slots]), axis=-1))

    def step(params):
        with executing(Execution(scan=False)):
            return jax.value_and_grad(loss)(params)

    counted = toys.product_flops(step, model.abstract())
    formula = rows * length * config.flops_per_token(length, slots / length)
    # XLA multiplies the padded vocabulary, and attention computes its scores twice.
    extra_vocabulary = config.padded_vocab_size - config.vocab_size
    formula += 6 * rows * slots * config.hidden_size * extra_vocabulary
    formula += 2 * rows * config.num_hidden_layers * length**2 * config.hidden_size
    assert abs(counted / formula - 1) < FLOPS_COUNTED, counted / formula
