"""What may come in from Transformers, under which names, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from flaxpretrain.conversion.importing import import_model
from flaxpretrain.conversion.sources import load_pretrained, open_checkpoint, read_origin
from flaxpretrain.conversion.tensors import read_tensors, write_tensors
from flaxpretrain.errors import UserError
from flaxpretrain.models.names import flatten
from tests import toys
from tests.conversion.originals import tokenizer

torch = pytest.importorskip("torch", reason="makes the originals with PyTorch Transformers")
pytestmark = pytest.mark.hf


@pytest.fixture
def copy(bert_folder, tmp_path):
    """A copy of the original that a test may spoil."""
    return shutil.copytree(bert_folder, tmp_path / "copy")


def change_tensors(folder, change):
    tensors = read_tensors(folder)
    (folder / "model.safetensors").unlink()
    write_tensors(folder, change(tensors))


def same(left, right):
    left, right = dict(flatten(left)), dict(flatten(right))
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def test_old_names_buffers_and_unused_heads_are_told(copy, bert_folder, tmp_path):
    def older(tensors):
        named = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): tensor
            for name, tensor in tensors.items()
        }
        named["bert.embeddings.position_ids"] = np.arange(34, dtype=np.int64)[None]
        named["bert.pooler.dense.weight"] = np.zeros((24, 24), np.float32)
        named["bert.pooler.dense.bias"] = np.zeros(24, np.float32)
        return named

    change_tensors(copy, older)
    lines = []
    import_model(copy, tmp_path / "workdir", None, say=lines.append)
    same(open_checkpoint(tmp_path / "workdir").part(None)[1], load_pretrained(bert_folder).params)
    said = "\n".join(lines)
    assert "dropped bert.embeddings.position_ids" in said
    assert "dropped bert.pooler.dense.weight: the configuration has no such head" in said
    assert "gamma" in said and "beta" in said


def test_a_pytorch_file_gives_the_same_parameters(copy, bert_folder):
    tensors = {name: torch.tensor(t) for name, t in read_tensors(copy).items()}
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    same(load_pretrained(copy).params, load_pretrained(bert_folder).params)


def test_all_odd_names_are_listed_in_one_error(copy):
    def spoil(tensors):
        del tensors["bert.encoder.layer.1.output.dense.weight"]
        del tensors["bert.embeddings.LayerNorm.bias"]
        tensors["bert.surprise"] = np.zeros(3, np.float32)
        tensors["bert.embeddings.position_embeddings.weight"] = np.zeros((5, 24), np.float32)
        return tensors

    change_tensors(copy, spoil)
    with pytest.raises(UserError) as error:
        load_pretrained(copy)
    for part in (
        "missing: bert.encoder.layer.1.output.dense.weight",
        "missing: bert.embeddings.LayerNorm.bias",
        "left over: bert.surprise",
        "position_embeddings.weight: shape (5, 24), expected (34, 24)",
        str(copy),
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "xlnet"},
            "is 'xlnet'; known: albert, bart, bert, distilbert, electra, gpt2, roberta, t5",
        ),
        ({"model_type": "../bert"}, "known: albert, bart, bert"),
        ({"model_type": None}, "known: albert, bart, bert"),
        ({"architectures": ["BertForSequenceClassification"]}, "architectures names"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"vocab_size": 100}, r"word_embeddings.weight: shape \(83, 24\), expected \(100, 24\)"),
    ],
)
def test_configurations_that_do_not_fit(copy, changes, message):
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(UserError, match=message):
        load_pretrained(copy)


def test_a_missing_or_broken_configuration(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read as JSON"):
        load_pretrained(copy)
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match="config.json is not there"):
        load_pretrained(copy)


def test_what_is_neither_a_folder_nor_a_hub_id():
    with pytest.raises(UserError, match="expected a workdir with checkpoints, a Hugging Face fol"):
        load_pretrained("no/such/folder")


def test_the_workdir_holds_tokenizer_and_origin_and_is_not_overwritten(bert_folder, tmp_path):
    made = import_model(bert_folder, tmp_path / "w", None, say=print)
    assert (made.workdir / "tokenizer" / "tokenizer.json").read_bytes() == (
        bert_folder / "tokenizer.json"
    ).read_bytes()
    assert read_origin(made.workdir).name == bert_folder.name
    assert read_origin(made.workdir).hub_id is None
    with pytest.raises(UserError, match="is in use"):
        import_model(bert_folder, tmp_path / "w", None, say=print)


def test_with_a_recipe_the_checkpoint_is_for_that_run(bert_folder, tmp_path):
    run = toys.run(model=toys.bert(hidden_dropout_prob=0.3), name="toy")
    made = import_model(bert_folder, tmp_path / "w", run, say=print)
    assert set(made.flags) == {
        "--set model.vocab_size=83",
        "--set model.hidden_size=24",
        "--set model.num_attention_heads=3",
        "--set model.intermediate_size=40",
        "--set model.max_position_embeddings=34",
    }
    assert made.config.hidden_dropout_prob == 0.3
    checkpoint = open_checkpoint(made.workdir)
    assert checkpoint.step == 0
    assert checkpoint.run == dataclasses.replace(run, model=made.config)
    same(checkpoint.part(None)[1], load_pretrained(bert_folder).params)


def test_a_recipe_of_another_architecture_is_refused(tmp_path, bert_folder):
    from flaxpretrain.models.roberta import RobertaConfig

    run = toys.run(model=RobertaConfig(vocab_size=83))
    with pytest.raises(UserError, match="is a bert, but the recipe run trains a roberta"):
        import_model(bert_folder, tmp_path / "w", run, say=print)


def test_half_a_model_without_tokenizer_is_said(copy, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    lines = []
    import_model(copy, tmp_path / "w", None, say=lines.append)
    assert any("no tokenizer" in line for line in lines)


def test_the_tokenizer_helper_makes_the_asked_for_size(tmp_path):
    from transformers import AutoTokenizer

    assert len(AutoTokenizer.from_pretrained(tokenizer(tmp_path, 90))) == 90
