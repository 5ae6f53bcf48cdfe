"""Logits equal Transformers', for every option of its configurations; names go both ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.models.albert import AlbertConfig
from flaxpretrain.models.bert import BertConfig
from flaxpretrain.models.distilbert import DistilBertConfig
from flaxpretrain.models.electra import ElectraConfig
from flaxpretrain.models.functional import model_of
from flaxpretrain.models.names import flatten, to_params, to_state_dict
from flaxpretrain.models.positions import restarting
from flaxpretrain.models.roberta import RobertaConfig
from tests.tolerances import GRADIENTS_FLOAT32, LOGITS_FLOAT32

pytestmark = pytest.mark.hf

TINY = dict(
    vocab_size=101,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=19,
)

DISTILBERT = dict(
    vocab_size=101, dim=24, n_layers=3, n_heads=3, hidden_dim=40, max_position_embeddings=19
)

PAIR_LOGITS = {"bert": "seq_relationship_logits", "albert": "sop_logits"}

GRID = [
    (BertConfig, "BertForMaskedLM", {}),
    (BertConfig, "BertForMaskedLM", {"vocab_size": 128, "hidden_act": "gelu_new"}),
    (BertConfig, "BertForMaskedLM", {"vocab_size": 129, "hidden_act": "relu"}),
    (BertConfig, "BertForMaskedLM", {"layer_norm_eps": 1e-3, "hidden_act": "silu"}),
    (BertConfig, "BertForMaskedLM", {"type_vocab_size": 5, "hidden_act": "gelu_pytorch_tanh"}),
    (BertConfig, "BertForMaskedLM", {"tie_word_embeddings": False, "hidden_act": "mish"}),
    (BertConfig, "BertForMaskedLM", {"num_hidden_layers": 1, "num_attention_heads": 1}),
    (BertConfig, "BertForMaskedLM", {"num_attention_heads": 24, "pad_token_id": 7}),
    (BertConfig, "BertForPreTraining", {"hidden_act": "quick_gelu"}),
    (BertConfig, "BertForPreTraining", {"tie_word_embeddings": False}),
    (BertConfig, "BertForNextSentencePrediction", {"intermediate_size": 7}),
    (BertConfig, "BertModel", {"hidden_act": "tanh"}),
    (RobertaConfig, "RobertaForMaskedLM", {}),
    (RobertaConfig, "RobertaForMaskedLM", {"pad_token_id": 4, "hidden_act": "relu"}),
    (RobertaConfig, "RobertaForMaskedLM", {"tie_word_embeddings": False, "vocab_size": 127}),
    (RobertaConfig, "RobertaForMaskedLM", {"type_vocab_size": 3, "layer_norm_eps": 1e-6}),
    (RobertaConfig, "RobertaModel", {"hidden_act": "gelu_fast"}),
    (AlbertConfig, "AlbertForMaskedLM", {"embedding_size": 11}),
    (AlbertConfig, "AlbertForMaskedLM", {"embedding_size": 24, "tie_word_embeddings": False}),
    (AlbertConfig, "AlbertForMaskedLM", {"num_hidden_groups": 2, "hidden_act": "relu"}),
    (AlbertConfig, "AlbertForPreTraining", {"num_hidden_groups": 3, "vocab_size": 129}),
    (AlbertConfig, "AlbertForPreTraining", {"num_hidden_layers": 5, "num_hidden_groups": 2}),
    (AlbertConfig, "AlbertModel", {"embedding_size": 7, "layer_norm_eps": 1e-3}),
    (DistilBertConfig, "DistilBertForMaskedLM", {}),
    (DistilBertConfig, "DistilBertForMaskedLM", {"vocab_size": 128, "activation": "relu"}),
    (DistilBertConfig, "DistilBertForMaskedLM", {"sinusoidal_pos_embds": True, "n_heads": 24}),
    (DistilBertConfig, "DistilBertForMaskedLM", {"tie_word_embeddings": False, "vocab_size": 129}),
    (DistilBertConfig, "DistilBertForMaskedLM", {"pad_token_id": 7, "n_layers": 1}),
    (DistilBertConfig, "DistilBertModel", {"activation": "gelu_new", "hidden_dim": 7}),
    (ElectraConfig, "ElectraForPreTraining", {"embedding_size": 11}),
    (ElectraConfig, "ElectraForPreTraining", {"embedding_size": 24, "hidden_act": "relu"}),
    (ElectraConfig, "ElectraForPreTraining", {"layer_norm_eps": 1e-3, "type_vocab_size": 3}),
    (ElectraConfig, "ElectraForMaskedLM", {"embedding_size": 40, "vocab_size": 128}),
    (ElectraConfig, "ElectraForMaskedLM", {"embedding_size": 24, "hidden_act": "silu"}),
    (ElectraConfig, "ElectraForMaskedLM", {"embedding_size": 9, "layer_norm_eps": 1e-5}),
    (ElectraConfig, "ElectraForMaskedLM", {"tie_word_embeddings": False, "vocab_size": 129}),
    (ElectraConfig, "ElectraModel", {"embedding_size": 7, "num_attention_heads": 1}),
    (ElectraConfig, "ElectraModel", {"embedding_size": 24, "hidden_act": "gelu_new"}),
]
CASES = [
    pytest.param(*case, id=f"{case[1]}-{'-'.join(map(str, case[2].values()))}") for case in GRID
]


def oracle(config_class, name, options):
    """A random Transformers network; every bias and scale moved off its trivial start."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    kind = getattr(transformers, config_class.__name__)
    tiny = DISTILBERT if config_class is DistilBertConfig else TINY
    theirs = kind(**{**tiny, **options})
    if theirs.pad_token_id is not None and name.startswith("Roberta"):
        theirs.max_position_embeddings = TINY["max_position_embeddings"] + theirs.pad_token_id + 1
    network = getattr(transformers, name)(theirs).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def tensors_of(network):
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def batch_of(config):
    rng = np.random.default_rng(1)
    ids = rng.integers(config.pad_token_id + 1, config.vocab_size, (3, 17)).astype(np.int32)
    segments = np.ones_like(ids)
    for row, real in enumerate((17, 11, 1)):
        ids[row, real:], segments[row, real:] = config.pad_token_id, 0
    types = rng.integers(0, getattr(config, "type_vocab_size", 1), ids.shape).astype(np.int32)
    return ids, segments, types


def their_outputs(network, ids, segments, types):
    torch = pytest.importorskip("torch")

    arrays = {"input_ids": ids, "attention_mask": segments, "token_type_ids": types}
    if network.config.model_type == "distilbert":
        del arrays["token_type_ids"]
    with torch.no_grad():
        out = network(**{n: torch.tensor(a, dtype=torch.long) for n, a in arrays.items()})
    return {name: value.numpy() for name, value in out.items() if hasattr(value, "numpy")}


def our_outputs(config, params, ids, segments, types):
    model = model_of(config.build)

    @jax.jit
    def forward(params, ids, segments, types):
        module = model.bind(params)
        hidden = module.embed(ids, segments, restarting(segments), types)
        hidden = module.encode(hidden, segments)
        out = {"hidden": hidden}
        if "mlm" in config.heads:
            out["logits"] = module.logits(hidden)
        if "pooler" in config.heads:
            out["pooled"] = module.pool(hidden, jnp.zeros((len(ids), 1), jnp.int32))
        if "nsp" in config.heads:
            out["nsp"] = module.next_sentence_logits(out["pooled"])[:, 0]
        if "discriminator" in config.heads:
            out["scores"] = module.discriminate(hidden)
        return out

    return {
        name: np.asarray(value) for name, value in forward(params, ids, segments, types).items()
    }


@pytest.mark.parametrize(("config_class", "name", "options"), CASES)
def test_outputs_equal_those_of_transformers(config_class, name, options):
    network = oracle(config_class, name, options)
    config = config_class.from_hf(network.config.to_dict() | {"architectures": [name]})
    params, _ = to_params(
        tensors_of(network), config.names, model_of(config.build).abstract(), config.vocab_size
    )
    batch = batch_of(config)
    theirs, ours = their_outputs(network, *batch), our_outputs(config, params, *batch)
    real = batch[1] > 0

    pairs = []
    if "mlm" in config.heads:
        name_of_logits = "prediction_logits" if "nsp" in config.heads else "logits"
        logits = ours["logits"]
        assert np.all(logits[..., config.vocab_size :] < -1e29)
        pairs.append((logits[..., : config.vocab_size][real], theirs[name_of_logits][real]))
    elif "discriminator" in config.heads:
        pairs.append((ours["scores"][real], theirs["logits"][real]))
    elif "nsp" not in config.heads:
        pairs.append((ours["hidden"][real], theirs["last_hidden_state"][real]))
        if "pooler" in config.heads:
            pairs.append((ours["pooled"][:, 0], theirs["pooler_output"]))
    if "nsp" in config.heads:
        pairs.append(
            (
                ours["nsp"],
                theirs[PAIR_LOGITS[config.model_type] if "mlm" in config.heads else "logits"],
            )
        )
    for mine, reference in pairs:
        assert np.abs(reference).max() > 0.05
        np.testing.assert_allclose(mine, reference, rtol=0, atol=LOGITS_FLOAT32)


@pytest.mark.parametrize(("config_class", "name", "options"), CASES)
def test_tensors_go_there_and_back_unchanged(config_class, name, options):
    network = oracle(config_class, name, options)
    theirs = tensors_of(network)
    config = config_class.from_hf(network.config.to_dict() | {"architectures": [name]})
    model = model_of(config.build)
    params, notes = to_params(theirs, config.names, model.abstract(), config.vocab_size)
    back = to_state_dict(params, config.names, config.vocab_size)

    tied = {n for note in notes for n in [note.removeprefix("dropped ").split(":")[0]]}
    assert set(back) == set(theirs) - (tied - set(back))
    unused = {"cls.predictions.bias", "lm_head.bias", "predictions.bias"} & tied
    for tensor_name in set(back) - unused:
        np.testing.assert_array_equal(back[tensor_name], theirs[tensor_name])


@pytest.mark.parametrize(("config_class", "name", "options"), CASES)
def test_transformers_loads_the_export_whole(config_class, name, options, tmp_path):
    torch = pytest.importorskip("torch")

    network = oracle(config_class, name, options)
    config = config_class.from_hf(network.config.to_dict() | {"architectures": [name]})
    params = jax.jit(model_of(config.build).init)(jax.random.key(3))
    exported = type(network.config)(**config.to_hf())
    assert exported.architectures == [name]
    fresh = type(network)(exported).eval()
    tensors = to_state_dict(jax.tree.map(np.asarray, params), config.names, config.vocab_size)
    result = fresh.load_state_dict({n: torch.tensor(t) for n, t in tensors.items()}, strict=False)
    fresh.tie_weights()
    assert not result.unexpected_keys
    tied = (
        ("decoder.weight", "decoder.bias", "lm_head.weight", "vocab_projector.weight")
        if config.tie_word_embeddings
        else ()
    )
    assert all(n.endswith(tied) for n in result.missing_keys)
    batch = batch_of(config)
    theirs, ours = their_outputs(fresh, *batch), our_outputs(config, params, *batch)
    for key in {"logits", "prediction_logits"} & set(theirs) if "mlm" in config.heads else ():
        np.testing.assert_allclose(
            ours["logits"][..., : config.vocab_size][batch[1] > 0],
            theirs[key][batch[1] > 0],
            rtol=0,
            atol=LOGITS_FLOAT32,
        )
    if "discriminator" in config.heads:
        mine, reference = ours["scores"][batch[1] > 0], theirs["logits"][batch[1] > 0]
        np.testing.assert_allclose(mine, reference, rtol=0, atol=LOGITS_FLOAT32)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_equal_those_of_transformers(tied):
    torch = pytest.importorskip("torch")

    network = oracle(BertConfig, "BertForMaskedLM", {"tie_word_embeddings": tied})
    config = BertConfig.from_hf(network.config.to_dict() | {"architectures": ["BertForMaskedLM"]})
    model = model_of(config.build)
    read = functools.partial(
        to_params, entries=config.names, shapes=model.abstract(), vocab_size=config.vocab_size
    )
    ids, segments, types = batch_of(config)
    labels = np.where(segments > 0, (7 * ids) % config.vocab_size, -100)
    network(
        input_ids=torch.tensor(ids, dtype=torch.long),
        attention_mask=torch.tensor(segments, dtype=torch.long),
        token_type_ids=torch.tensor(types, dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
    ).loss.backward()
    theirs = {
        name: np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        for name, parameter in network.named_parameters()
    }

    @jax.jit
    @jax.grad
    def gradients(params, ids, segments, types, labels):
        module = model.bind(params)
        hidden = module.encode(module.embed(ids, segments, restarting(segments), types), segments)
        nats = -jax.nn.log_softmax(module.logits(hidden))
        chosen = jnp.take_along_axis(nats, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(labels >= 0, chosen, 0.0)) / jnp.sum(
            labels >= 0, dtype=jnp.float32
        )

    ours = gradients(read(tensors_of(network)).params, ids, segments, types, labels)
    expected = dict(flatten(read(theirs).params))
    # PyTorch's tables learn nothing for the padding token; padding has no gradient here either.
    for path, gradient in flatten(ours):
        np.testing.assert_allclose(gradient, expected[path], rtol=0, atol=GRADIENTS_FLOAT32)
