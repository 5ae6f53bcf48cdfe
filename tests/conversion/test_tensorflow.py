"""Checkpoints that google-research/bert and google-research/electra trained, and their outputs.

`fixtures/tensorflow`: the original code (electra at 8a46635, bert at eedf571) under TensorFlow
1.15 and Python 3.7 built its own graphs at hidden size 8 (two layers, two heads, ELECTRA's
embeddings 6 wide and its generator 4), drew all weights from a normal distribution, made three
training steps and saved. `electra` holds the optimizer's slots; the others hold weights only, as
released checkpoints do: `electra_mlm` with electra_objective=false, `electra_untied` with
untied_generator_embeddings=true. `outputs.npz` holds two rows of ids, the second one padded, and
what the same code, restored in evaluation mode, computed for them.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from flaxpretrain.conversion import tensorflow
from flaxpretrain.conversion.bundle import Bundle
from flaxpretrain.conversion.tensorflow import read_checkpoint
from flaxpretrain.conversion.tensors import write_tensors
from flaxpretrain.errors import UserError
from tests.tolerances import LOGITS_FLOAT32

FIXTURES = Path(__file__).parent / "fixtures" / "tensorflow"


def prefix(name):
    return FIXTURES / name / "model.ckpt-3"


@pytest.fixture
def two_heads(tmp_path):
    """The configuration that the shapes do not show; gelu_new is what bert at eedf571 computes."""

    def write(name):
        act = "gelu_new" if name == "bert" else "gelu"
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"num_attention_heads": 2, "hidden_act": act}))
        return path

    return write


def read(name, two_heads):
    return read_checkpoint(prefix(name), two_heads(name))


@pytest.mark.hf
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("electra", ["discriminator", "generator"]),
        ("electra_untied", ["discriminator", "generator"]),
        ("electra_mlm", ["generator"]),
        ("bert", ["model"]),
    ],
)
def test_transformers_computes_what_the_original_computed(name, parts, two_heads, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with PyTorch Transformers")
    import transformers

    models = read(name, two_heads).models
    assert list(models) == parts
    with np.load(prefix(name).with_name("outputs.npz")) as file:
        expected = dict(file)
    real = expected["attention_mask"] > 0
    inputs = {
        key: torch.tensor(expected[key], dtype=torch.long)
        for key in ("input_ids", "attention_mask", "token_type_ids")
    }
    for part, model in models.items():
        (tmp_path / part).mkdir()
        write_tensors(tmp_path / part, model.tensors)
        (tmp_path / part / "config.json").write_text(json.dumps(model.values))
        kind = getattr(transformers, model.values["architectures"][0])
        loaded, report = kind.from_pretrained(tmp_path / part, output_loading_info=True)
        assert not any(report.values()), report
        with torch.no_grad():
            found = loaded.eval()(**inputs)
        if part == "model":
            sentence = torch.log_softmax(found.seq_relationship_logits, -1).numpy()
            assert np.abs(sentence - expected["nsp_log_probs"]).max() < LOGITS_FLOAT32
            ours = torch.log_softmax(found.prediction_logits, -1).numpy()
            theirs = expected["log_probs"].reshape(ours.shape)
        else:
            ours = found.logits.numpy()
            theirs = expected[f"{part}_logits"].reshape(ours.shape)
        assert np.abs(theirs[real]).max() > 0.5
        assert np.abs(ours - theirs)[real].max() < LOGITS_FLOAT32


def test_slots_are_counted_and_sizes_read_off_the_tensors(two_heads):
    found = read("electra", two_heads)
    assert found.dropped == 165 and not found.heads_assumed
    discriminator, generator = found.models["discriminator"], found.models["generator"]
    sizes = {
        "vocab_size": 30,
        "embedding_size": 6,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 12,
        "model_type": "electra",
    }
    assert sizes.items() <= discriminator.values.items()
    # Of a generator, whatever is said of the discriminator: one head for 64 units.
    narrower = sizes | {"hidden_size": 4, "num_attention_heads": 1}
    assert narrower.items() <= generator.values.items()
    shared = "electra.embeddings.word_embeddings.weight"
    assert (discriminator.tensors[shared] == generator.tensors[shared]).all()
    assert read("electra_untied", two_heads).models["generator"].values["embedding_size"] == 4


def test_a_configuration_is_found_beside_the_checkpoint_or_its_heads_are_assumed():
    beside = read_checkpoint(prefix("bert"))
    assert beside.models["model"].values["num_attention_heads"] == 2 and not beside.heads_assumed
    nowhere = read_checkpoint(prefix("electra"))
    assert nowhere.models["discriminator"].values["num_attention_heads"] == 1
    assert nowhere.heads_assumed


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 9}, "contradicts the discriminator: hidden_size 9, not 8"),
        ({"vocab_size": 7, "num_hidden_layers": 3}, "vocab_size 7, not 30; num_hidden_layers 3, n"),
        ({"num_attention_heads": 3}, "3 attention heads do not divide the discriminator's hidden"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors(tmp_path, values, message):
    (tmp_path / "c.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        read_checkpoint(prefix("electra"), tmp_path / "c.json")


@dataclasses.dataclass
class Changed:
    """A checkpoint with other names: None takes one out."""

    of: Bundle
    names: dict

    @property
    def shapes(self):
        renamed = {self.names.get(name, name): shape for name, shape in self.of.shapes.items()}
        return {name: shape for name, shape in renamed.items() if name is not None}

    def read(self, name):
        back = {new: old for old, new in self.names.items()}
        return self.of.read(back.get(name, name))


@pytest.fixture
def change(monkeypatch):
    def change(**names):
        names = {old.replace("__", "/"): new for old, new in names.items()}
        monkeypatch.setattr(tensorflow, "Bundle", lambda path: Changed(Bundle(path), names))

    return change


def test_all_odd_names_are_in_one_error(change):
    change(
        generator__encoder__layer_1__output__dense__bias=None,
        electra__embeddings__LayerNorm__beta=None,
        discriminator_predictions__dense_1__kernel="task_specific/kernel",
    )
    with pytest.raises(UserError) as error:
        read_checkpoint(prefix("electra"))
    for part in (
        "model.ckpt-3: 4 tensors do not fit",
        "left over: task_specific/kernel",
        "missing: discriminator_predictions/dense_1/kernel",
        "missing: electra/embeddings/LayerNorm/beta",
        "missing: generator/encoder/layer_1/output/dense/bias",
    ):
        assert part in str(error.value)


def test_electric_and_foreign_checkpoints_are_named(change):
    with pytest.raises(
        UserError, match=r"no tensor's name begins with bert/ or electra/ \(such as"
    ):
        read_checkpoint(prefix("mixed"))
    change(generator__embeddings_project__bias="generator_ltr/embeddings_project/bias")
    with pytest.raises(UserError, match="an Electric checkpoint"):
        read_checkpoint(prefix("electra"))


@pytest.mark.parametrize(
    ("gone", "architecture"),
    [
        (("cls/seq_relationship",), "BertForMaskedLM"),
        (("cls/seq_relationship", "cls/predictions", "bert/pooler"), "BertModel"),
        (("cls/predictions",), "BertForNextSentencePrediction"),
    ],
)
def test_bert_with_fewer_heads(change, gone, architecture):
    without(change, "bert", gone)
    assert read_checkpoint(prefix("bert")).models["model"].values["architectures"] == [architecture]


def without(change, name, start):
    names = [n for n in Bundle(prefix(name)).shapes if n.startswith(start)]
    change(**{n.replace("/", "__"): None for n in names if "adam" not in n})


def test_one_network_with_both_heads_is_both_parts(change):
    """untied_generator=false: the generator's layers are the discriminator's."""
    without(change, "electra", "generator/")
    models = read_checkpoint(prefix("electra")).models
    layer = "electra.encoder.layer.1.output.dense.weight"
    assert list(models) == ["discriminator", "generator"]
    assert (models["discriminator"].tensors[layer] == models["generator"].tensors[layer]).all()


def test_a_network_without_heads_is_the_bare_model(change):
    without(change, "electra_mlm", "generator_predictions/")
    models = read_checkpoint(prefix("electra_mlm")).models
    assert models["discriminator"].values["architectures"] == ["ElectraModel"]
