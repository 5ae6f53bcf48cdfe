"""Random models of Transformers come in, go out, and are the same, bit for bit."""

import numpy as np
import pytest

from flaxpretrain.conversion.card import Facts
from flaxpretrain.conversion.export import export
from flaxpretrain.conversion.importing import import_model
from flaxpretrain.conversion.sources import load_pretrained, open_checkpoint
from flaxpretrain.conversion.tensors import read_tensors
from tests.conversion.originals import original, outputs, tokenizer
from tests.tolerances import LOGITS_FLOAT32

torch = pytest.importorskip("torch", reason="compares with PyTorch Transformers")
pytestmark = pytest.mark.hf

ROBERTA = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}

GRID = {
    "bert-masked": ("BertForMaskedLM", {}),
    "bert-vocabulary-of-128": ("BertForMaskedLM", {"vocab_size": 128}),
    "bert-vocabulary-of-129": ("BertForMaskedLM", {"vocab_size": 129}),
    "bert-untied": ("BertForMaskedLM", {"tie_word_embeddings": False}),
    "bert-relu-eps": ("BertForMaskedLM", {"hidden_act": "relu", "layer_norm_eps": 1e-5}),
    "bert-gelu-new-4-types": ("BertForMaskedLM", {"hidden_act": "gelu_new", "type_vocab_size": 4}),
    "bert-pretraining": ("BertForPreTraining", {"hidden_act": "silu"}),
    "bert-pretraining-untied": ("BertForPreTraining", {"tie_word_embeddings": False}),
    "bert-next-sentence": ("BertForNextSentencePrediction", {}),
    "bert-bare": ("BertModel", {}),
    "bert-one-layer-one-head": (
        "BertForMaskedLM",
        {"num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 77},
    ),
    "roberta-masked": ("RobertaForMaskedLM", ROBERTA),
    "roberta-untied": ("RobertaForMaskedLM", {**ROBERTA, "tie_word_embeddings": False}),
    "roberta-other-padding": ("RobertaForMaskedLM", {**ROBERTA, "pad_token_id": 3}),
    "roberta-2-types": ("RobertaForMaskedLM", {**ROBERTA, "type_vocab_size": 2}),
    "roberta-bare": ("RobertaModel", ROBERTA),
    "albert-masked": ("AlbertForMaskedLM", {"vocab_size": 129}),
    "albert-untied": ("AlbertForMaskedLM", {"tie_word_embeddings": False}),
    "albert-pretraining-2-groups": ("AlbertForPreTraining", {"num_hidden_groups": 2}),
    "albert-bare": ("AlbertModel", {}),
    "distilbert-masked": ("DistilBertForMaskedLM", {"vocab_size": 129}),
    "distilbert-untied": ("DistilBertForMaskedLM", {"tie_word_embeddings": False}),
    "distilbert-waves": ("DistilBertForMaskedLM", {"sinusoidal_pos_embds": True}),
    "distilbert-bare": ("DistilBertModel", {"activation": "relu"}),
}


@pytest.mark.parametrize("name", GRID)
def test_in_and_out_is_the_same_model(name, tmp_path):
    class_name, options = GRID[name]
    model = original(class_name, **options)
    model.save_pretrained(tmp_path / "original")
    tokenizer(tmp_path / "original", model.config.vocab_size, name.split("-")[0])

    import_model(tmp_path / "original", tmp_path / "workdir", None, say=print)
    checkpoint = open_checkpoint(tmp_path / "workdir")
    config, params = checkpoint.part(None)
    exported = export(config, params, checkpoint.tokenizer, tmp_path / "out", Facts(name="test"))

    assert exported.comparison is not None
    assert exported.comparison.difference <= LOGITS_FLOAT32
    before, after = read_tensors(tmp_path / "original"), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        np.testing.assert_array_equal(after[tensor], value, err_msg=tensor)
        assert after[tensor].dtype == np.float32
    again = type(model).from_pretrained(tmp_path / "out").eval()
    for output, value in outputs(model).items():
        np.testing.assert_array_equal(outputs(again)[output], value, err_msg=output)


def test_a_bare_model_without_pooler(tmp_path):
    model = original("BertModel", extra={"add_pooling_layer": False})
    model.save_pretrained(tmp_path)
    config, params, _ = load_pretrained(tmp_path)
    assert config.heads == ()
    assert params.keys() == {"embeddings", "encoder"}


def test_a_network_with_half_of_a_classs_heads_loses_them_by_name(tmp_path, bert_folder):
    """A masked LM with a pooler is no class of Transformers: the pooler is left out and named."""
    from dataclasses import replace

    from transformers import AutoModelForMaskedLM

    config, params, folder = load_pretrained(bert_folder)
    width = config.hidden_size
    params = {
        **params,
        "pooler": {
            "kernel": np.ones((width, width), np.float32),
            "bias": np.ones(width, np.float32),
        },
    }
    with_pooler = replace(config, heads=("mlm", "pooler"))
    exported = export(with_pooler, params, folder, tmp_path / "out", Facts(name="test"))
    assert exported.dropped == ("pooler/bias", "pooler/kernel")
    _, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
