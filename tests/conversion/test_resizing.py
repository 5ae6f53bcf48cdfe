"""New tokens get embeddings: the mean of their pieces, in every table, and old rows stay."""

import dataclasses

import numpy as np
import pytest

from flaxpretrain.conversion.init_from import weights_from
from flaxpretrain.conversion.resizing import pieces_of, resized_for_tokenizer
from flaxpretrain.conversion.sources import load_pretrained, open_model
from flaxpretrain.data import tokenizers
from flaxpretrain.data.tokenizer_extension import extend
from flaxpretrain.errors import UserError
from flaxpretrain.models.names import flatten
from tests import toys
from tests.conversion.originals import original, tokenizer

pytest.importorskip("torch", reason="makes the originals with PyTorch Transformers")
pytestmark = pytest.mark.hf
FILMS = ["the filmed cat filmed a dog", "films"] * 3


@pytest.fixture(scope="module")
def larger(bert_folder, tmp_path_factory):
    """The tokenizer of the folder with more tokens, and the folder of it."""
    folder = tmp_path_factory.mktemp("larger")
    made = extend(tokenizers.load(bert_folder), FILMS, 90)
    made.tokenizer.save(folder)
    return made, folder


def test_new_rows_are_means_of_the_pieces_and_old_rows_stay(bert_folder, larger):
    made, folder = larger
    model, _ = open_model(bert_folder)
    old = tokenizers.load(bert_folder)
    size, first = made.tokenizer.vocabulary.size, old.vocabulary.size
    said = []
    new = resized_for_tokenizer(model, folder, "toy", said.append)
    assert new.values["vocab_size"] == size and new.tokenizer == folder
    assert f"{size - first} new tokens from id {first} on" in said[0]
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        before, after = np.asarray(model.tensors[name]), new.tensors[name]
        np.testing.assert_array_equal(after[:first], before[:first])
        for number, token in enumerate(made.added, first):
            pieces = pieces_of(old, token)
            assert pieces, token
            np.testing.assert_allclose(after[number], before[pieces].mean(0), rtol=1e-6)


def test_the_outputs_over_old_tokens_are_as_before(bert_folder, larger, tmp_path):
    """Transformers loads the resized export and computes the same for old ids."""
    from flaxpretrain.conversion.card import Facts
    from flaxpretrain.conversion.export import export
    from flaxpretrain.conversion.folders import config_of, params_of

    model = resized_for_tokenizer(open_model(bert_folder)[0], larger[1], "toy", print)
    config = config_of(model)
    params, _ = params_of(model, config, source="toy")
    exported = export(config, params, larger[1], tmp_path / "hf", Facts(name="toy"))
    assert exported.comparison is not None
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    expected = larger[0].tokenizer.encode_sentences(["the filmed cat"])[0].tolist()
    assert theirs("the filmed cat", add_special_tokens=False)["input_ids"] == expected


def test_init_from_fits_the_model_to_a_dataset_of_the_larger_tokenizer(
    bert_folder, larger, tmp_path
):
    made, folder = larger
    size = made.tokenizer.vocabulary.size
    config = dataclasses.replace(load_pretrained(bert_folder).config, vocab_size=size)
    run = toys.run(model=config)
    data = tmp_path / "data"
    made.tokenizer.save(data / "tokenizer")
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, folder=str(data)))
    said = []
    params = weights_from(bert_folder, run, say=said.append, workdir=tmp_path / "w")
    assert any("new tokens from id" in line for line in said)
    before = dict(flatten(load_pretrained(bert_folder).params))
    for path, leaf in flatten(params):
        if "word" not in path and "bias" not in path:
            np.testing.assert_array_equal(leaf, before[path], err_msg=path)


def test_a_table_that_is_long_enough_stays_so_long(tmp_path):
    original("T5ForConditionalGeneration", d_kv=8, d_model=24, d_ff=32).save_pretrained(tmp_path)
    tokenizer(tmp_path, 60)
    larger = extend(tokenizers.load(tmp_path), FILMS, 64)
    larger.tokenizer.save(tmp_path / "larger")
    model, _ = open_model(tmp_path)
    new = resized_for_tokenizer(model, tmp_path / "larger", "toy", print)
    assert new.values["vocab_size"] == 83
    assert new.tensors["shared.weight"].shape == (83, 24)
    assert not np.array_equal(new.tensors["shared.weight"][60], model.tensors["shared.weight"][60])


def test_another_tokenizer_is_no_extension(bert_folder, tmp_path):
    model, _ = open_model(bert_folder)
    tokenizer(tmp_path, 95, "roberta")
    with pytest.raises(UserError, match="does not extend that of toy"):
        resized_for_tokenizer(model, tmp_path, "toy", print)
    with pytest.raises(UserError, match="does not extend"):
        resized_for_tokenizer(model, bert_folder, "toy", print)
    without = dataclasses.replace(model, tokenizer=None)
    with pytest.raises(UserError, match="toy has no tokenizer"):
        resized_for_tokenizer(without, tmp_path, "toy", print)
