"""A new run may start from a model that exists, as far as both agree."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from flaxpretrain.conversion.init_from import weights_from
from flaxpretrain.conversion.sources import load_pretrained, read_origin
from flaxpretrain.errors import UserError
from flaxpretrain.models.names import flatten
from tests import toys
from tests.conversion.originals import original, tokenizer

pytest.importorskip("torch", reason="makes the originals with PyTorch Transformers")
pytestmark = pytest.mark.hf


def run_like(folder, **changes):
    """A toy run whose model has the sizes of the folder's."""
    return toys.run(model=dataclasses.replace(load_pretrained(folder).config, **changes))


def test_common_parts_are_copied(bert_folder, tmp_path):
    run = run_like(bert_folder)
    params = weights_from(bert_folder, run, say=print, workdir=tmp_path)
    expected = load_pretrained(bert_folder).params
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert read_origin(tmp_path).name == bert_folder.name


def test_a_workdir_is_a_source_too(checkpoint, bert_folder):
    run = run_like(bert_folder)
    params = weights_from(checkpoint.workdir, run, say=print)
    jax.tree.map(np.testing.assert_array_equal, params, load_pretrained(bert_folder).params)


def test_the_mesh_around_does_not_matter(bert_folder):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = run_like(bert_folder)
    with jax.set_mesh(mesh):
        params = weights_from(bert_folder, run, say=print)
    jax.tree.map(np.testing.assert_array_equal, params, load_pretrained(bert_folder).params)


def test_heads_that_the_source_lacks_start_fresh_and_are_told(tmp_path):
    original("BertModel").save_pretrained(tmp_path)
    run = run_like(tmp_path, heads=("mlm",))
    lines = []
    params = weights_from(tmp_path, run, say=lines.append)
    expected = load_pretrained(tmp_path).params
    for part in ("embeddings", "encoder"):
        jax.tree.map(np.testing.assert_array_equal, params[part], expected[part])
    assert np.std(params["mlm_head"]["dense"]["kernel"]) > 0.01
    assert any("kept mlm_head as initialised" in line for line in lines)
    assert any("dropped bert.pooler.dense.bias" in line for line in lines)
    again = weights_from(tmp_path, run, say=print)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_a_source_without_layers_is_an_error(bert_folder, tmp_path):
    from flaxpretrain.conversion.tensors import read_tensors, write_tensors

    shutil.copy(bert_folder / "config.json", tmp_path)
    tensors = read_tensors(bert_folder)
    write_tensors(tmp_path, {n: t for n, t in tensors.items() if ".encoder." not in n})
    with pytest.raises(UserError, match="checkpoint has no encoder"):
        weights_from(tmp_path, run_like(bert_folder), say=print)


def test_another_size_or_activation_is_refused_with_the_flags_to_add(bert_folder):
    run = run_like(bert_folder, hidden_act="relu", vocab_size=90, hidden_dropout_prob=0.5)
    with pytest.raises(UserError) as error:
        weights_from(bert_folder, run, say=print)
    assert "--set model.vocab_size=83 --set model.hidden_act=gelu" in str(error.value)
    assert "dropout" not in str(error.value)


def test_another_architecture_is_refused(bert_folder):
    from flaxpretrain.models.roberta import RobertaConfig

    with pytest.raises(UserError, match="it is a bert, the run trains a roberta"):
        weights_from(bert_folder, toys.run(model=RobertaConfig()), say=print)


def test_another_tokenizer_is_refused(bert_folder, tmp_path):
    run = run_like(bert_folder)
    tokenizer(tmp_path / "dataset" / "tokenizer", 83)
    weights_from(bert_folder, run, say=print, workdir=tmp_path)
    tokenizer(tmp_path / "dataset" / "tokenizer", 83, "roberta")
    with pytest.raises(UserError, match="trained with another tokenizer than the dataset"):
        weights_from(bert_folder, run, say=print, workdir=tmp_path)


def test_every_leaf_is_float32_numpy(bert_folder):
    params = weights_from(bert_folder, run_like(bert_folder), say=print)
    assert {(type(a), a.dtype.name) for _, a in flatten(params)} == {(np.ndarray, "float32")}
