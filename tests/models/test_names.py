"""Names in Transformers' checkpoints: older spellings, ties, missing heads, one error for all."""

import jax
import numpy as np
import pytest

from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import model_of
from flaxpretrain.models.names import flatten, to_params, to_state_dict
from tests import toys

FULL = toys.bert(heads=("mlm", "pooler", "nsp"))
EMBEDDINGS = "bert.embeddings"


def parameters(config, seed=0):
    return jax.tree.map(np.asarray, model_of(config.build).init(jax.random.key(seed)))


def tensors(config=FULL):
    return to_state_dict(parameters(config), config.names, config.vocab_size)


def load(found, config=FULL, **options):
    shapes = model_of(config.build).abstract()
    return to_params(found, config.names, shapes, config.vocab_size, **options)


def assert_same(params, expected):
    """Equal up to the rows that pad the vocabulary, which come back as zeros."""
    ours, theirs = dict(flatten(params)), dict(flatten(expected))
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        reference = theirs[path].copy()
        if path in ("embeddings/words", "mlm_head/bias"):
            reference[300:] = 0
        np.testing.assert_array_equal(array, reference)


def test_names_and_shapes_are_those_of_transformers():
    found = tensors()
    assert found["bert.encoder.layer.1.attention.self.query.weight"].shape == (32, 32)
    assert found["bert.encoder.layer.0.intermediate.dense.weight"].shape == (64, 32)
    assert found["bert.embeddings.word_embeddings.weight"].shape == (300, 32)
    assert found["cls.predictions.bias"].shape == (300,)
    assert "cls.predictions.decoder.weight" not in found
    assert all(tensor.flags.c_contiguous for tensor in found.values())


def test_parameters_survive_the_way_there_and_back():
    params, notes = load(tensors())
    assert_same(params, parameters(FULL))
    assert notes == ()


def test_older_spellings_and_constants_are_understood_and_noted():
    found = tensors()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in found.items()
    }
    old["bert.embeddings.position_ids"] = np.arange(64)[None]
    params, notes = load(old)
    assert_same(params, parameters(FULL))
    assert any("position_ids: a constant" in note for note in notes)
    assert any("gamma" in note for note in notes) and any("beta" in note for note in notes)


def test_a_bare_network_has_no_prefix():
    bare = toys.bert(heads=("pooler",))
    found = tensors(bare)
    assert "embeddings.word_embeddings.weight" in found and "pooler.dense.bias" in found
    assert_same(load(found, bare).params, parameters(bare))


def test_unused_heads_are_dropped_and_noted():
    masked = toys.bert()
    params, notes = load(tensors(), masked)
    assert set(params) == {"embeddings", "encoder", "mlm_head"}
    assert sum("no such head" in note for note in notes) == 4


def test_a_missing_head_keeps_its_initial_parameters_only_where_allowed():
    found = tensors(toys.bert(heads=("pooler",)))
    config = toys.bert(heads=("mlm", "pooler"))
    with pytest.raises(UserError, match="5 names do not fit.*missing: cls.predictions"):
        load(found, config)
    initial = parameters(config, seed=5)
    params, notes = load(found, config, initial=initial)
    np.testing.assert_array_equal(
        params["mlm_head"]["dense"]["kernel"], initial["mlm_head"]["dense"]["kernel"]
    )
    assert notes == ("kept mlm_head as initialised: the checkpoint has none",)


def test_a_tied_decoder_may_stand_in_for_its_source_and_must_equal_it():
    found = tensors()
    words = found["bert.embeddings.word_embeddings.weight"]
    found["cls.predictions.decoder.weight"] = words
    assert any("tied to" in note for note in load(found).notes)
    del found["bert.embeddings.word_embeddings.weight"]
    assert_same(load(found).params, parameters(FULL))
    found["bert.embeddings.word_embeddings.weight"] = words + 1
    with pytest.raises(UserError, match="decoder.weight: differs from bert.embeddings"):
        load(found)


def test_an_untied_decoder_of_older_files_uses_the_one_bias_they_hold():
    config = toys.bert(tie_word_embeddings=False)
    found = tensors(config)
    found["cls.predictions.bias"] = found.pop("cls.predictions.decoder.bias") + 2
    params, _ = load(found, config)
    np.testing.assert_array_equal(params["mlm_head"]["decoder"]["bias"][:300], 2)


def test_one_error_lists_all_that_does_not_fit():
    found = tensors()
    del found["bert.encoder.layer.1.output.dense.bias"]
    found["bert.encoder.layer.7.output.dense.bias"] = np.zeros(32)
    found["bert.embeddings.token_type_embeddings.weight"] = np.zeros((3, 32))
    with pytest.raises(UserError) as caught:
        load(found)
    message = str(caught.value)
    assert "3 names do not fit" in message
    assert "missing: bert.encoder.layer.1.output.dense.bias" in message
    assert "left over: bert.encoder.layer.7.output.dense.bias" in message
    assert "token_type_embeddings.weight: shape (3, 32), expected (2, 32)" in message
    assert "\n" not in message
