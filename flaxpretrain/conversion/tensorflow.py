"""Checkpoints of google-research/bert and google-research/electra as Hugging Face models.

TensorFlow is not needed. An ELECTRA checkpoint holds two networks that share their embeddings:
each becomes a model of its own. The optimizer's slots are dropped; any other tensor without a
counterpart, and any that is missing, is an error.

Reference: google-research/bert modeling.py and run_pretraining.py; google-research/electra
model/modeling.py and run_pretraining.py.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxpretrain.conversion.bundle import Bundle
from flaxpretrain.conversion.folders import HubModel
from flaxpretrain.conversion.tensors import read_json
from flaxpretrain.errors import UserError

CONFIG_FILES = ("bert_config.json",)
"""What google-research/bert keeps beside a checkpoint; ELECTRA writes nothing of the kind."""

DISCRIMINATOR, GENERATOR, WHOLE = "discriminator", "generator", "model"

_DROPPED = re.compile(r"global_step|.+/adam_[mv]")
_HEAD_WIDTH = 64
"""How many units a head has in every published size of either model."""
_SHOWN = 12


class Name(NamedTuple):
    """A tensor's name here, `{}` for the number of the layer, and in Transformers."""

    theirs: str
    ours: str
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Imported:
    """What a checkpoint holds.

    models: by part, "model" for BERT, "discriminator" and "generator" for ELECTRA.
    dropped: how many tensors were the optimizer's.
    heads_assumed: whether the number of attention heads was nowhere stated.
    """

    models: Mapping[str, HubModel]
    dropped: int
    heads_assumed: bool


def _dense(theirs: str, ours: str) -> tuple[Name, ...]:
    return (
        Name(f"{theirs}/kernel", f"{ours}.weight", transposed=True),
        Name(f"{theirs}/bias", f"{ours}.bias"),
    )


def _norm(theirs: str, ours: str) -> tuple[Name, ...]:
    return Name(f"{theirs}/gamma", f"{ours}.weight"), Name(f"{theirs}/beta", f"{ours}.bias")


def _embeddings(scope: str, base: str) -> tuple[Name, ...]:
    tables = (f"{kind}_embeddings" for kind in ("word", "position", "token_type"))
    return (
        *(Name(f"{scope}/{table}", f"{base}.embeddings.{table}.weight") for table in tables),
        *_norm(f"{scope}/LayerNorm", f"{base}.embeddings.LayerNorm"),
    )


def _layers(scope: str, base: str) -> tuple[Name, ...]:
    theirs, ours = f"{scope}/encoder/layer_{{}}", f"{base}.encoder.layer.{{}}"
    attention = ("self/query", "self/key", "self/value", "output/dense")
    dense = (*(f"attention/{name}" for name in attention), "intermediate/dense", "output/dense")
    found = [_dense(f"{theirs}/{name}", f"{ours}.{name.replace('/', '.')}") for name in dense]
    for name in ("attention/output/LayerNorm", "output/LayerNorm"):
        found.append(_norm(f"{theirs}/{name}", f"{ours}.{name.replace('/', '.')}"))
    return tuple(name for pair in found for name in pair)


_BERT_HEADS: tuple[tuple[Name, ...], ...] = (
    _dense("bert/pooler/dense", "bert.pooler.dense"),
    (
        *_dense("cls/predictions/transform/dense", "cls.predictions.transform.dense"),
        *_norm("cls/predictions/transform/LayerNorm", "cls.predictions.transform.LayerNorm"),
        Name("cls/predictions/output_bias", "cls.predictions.bias"),
    ),
    (
        Name("cls/seq_relationship/output_weights", "cls.seq_relationship.weight"),
        Name("cls/seq_relationship/output_bias", "cls.seq_relationship.bias"),
    ),
)
_DISCRIMINATOR_HEAD = (
    *_dense("discriminator_predictions/dense", "discriminator_predictions.dense"),
    *_dense("discriminator_predictions/dense_1", "discriminator_predictions.dense_prediction"),
)
_GENERATOR_HEAD = (
    *_dense("generator_predictions/dense", "generator_predictions.dense"),
    *_norm("generator_predictions/LayerNorm", "generator_predictions.LayerNorm"),
    Name("generator_predictions/output_bias", "generator_lm_head.bias"),
)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A network in a checkpoint.

    scope: what the names of its layers begin with.
    derived: whether its head count follows from its width, whatever a configuration says.
    """

    scope: str
    architecture: str
    names: tuple[Name, ...]
    layers: int
    derived: bool = False

    def expected(self) -> dict[str, Name]:
        """The checkpoint's name of every tensor of this network, with its rule for that layer."""
        return {
            name.theirs.format(layer): name._replace(ours=name.ours.format(layer))
            for name in self.names
            for layer in (range(self.layers) if "{}" in name.theirs else [0])
        }


def read_checkpoint(prefix: Path, config: Path | None = None) -> Imported:
    """The networks of a checkpoint by Transformers' names and kinds of configuration.

    `config` is a bert_config.json, or any JSON object with fields of that name; without it, the
    one that lies beside the checkpoint. Sizes come from the tensors. The heads are `hidden_size`
    // 64 where no configuration says.

    Raises:
        UserError: no such checkpoint, damage, a tensor that has no counterpart or is missing (one
            line for all of them), or a configuration that contradicts the tensors.
    """
    bundle = Bundle(prefix)
    shapes = bundle.shapes
    kept = [name for name in shapes if not _DROPPED.fullmatch(name)]
    parts = _parts(prefix, kept)
    _check_names(prefix, kept, parts.values())
    stated = _stated(prefix, config)
    # Networks share tensors, which are read once.
    read = {name: bundle.read(name) for name in kept}
    models = {}
    for label, part in parts.items():
        tensors = {
            name.ours: read[theirs].T if name.transposed else read[theirs]
            for theirs, name in part.expected().items()
        }
        values = _values(label, part, tensors, stated, config or prefix)
        models[label] = HubModel(values, tensors, None)
    return Imported(models, len(shapes) - len(kept), "num_attention_heads" not in stated)


def _parts(prefix: Path, names: list[str]) -> dict[str, _Part]:
    """The networks that the names show."""

    def has(start: str) -> bool:
        return any(name.startswith(start) for name in names)

    def layers(scope: str) -> int:
        pattern = re.compile(re.escape(scope) + r"/encoder/layer_(\d+)/.+")
        found = [int(match[1]) for match in map(pattern.fullmatch, names) if match]
        return max(found, default=0) + 1

    if has("bert/"):
        heads = [head for head in _BERT_HEADS if any(name.theirs in names for name in head)]
        trunk = (*_embeddings("bert/embeddings", "bert"), *_layers("bert", "bert"))
        everything = (*trunk, *(name for head in heads for name in head))
        return {WHOLE: _Part("bert", _bert_class(heads), everything, layers("bert"))}
    if not has("electra/"):
        some = f"such as {names[0]}" if names else "it is empty"
        raise UserError(
            f"{prefix} is no checkpoint of google-research/bert or electra: no tensor's name "
            f"begins with bert/ or electra/ ({some})"
        )
    if has("generator_ltr/"):
        raise UserError(
            f"{prefix} is an Electric checkpoint: Transformers has no two-tower generator"
        )
    parts = {}
    if has("discriminator_predictions/") or not has("generator_predictions/"):
        head = _DISCRIMINATOR_HEAD if has("discriminator_predictions/") else ()
        kind = "ElectraForPreTraining" if head else "ElectraModel"
        names_of = _electra(has, "electra", "electra/embeddings") + head
        parts[DISCRIMINATOR] = _Part("electra", kind, names_of, layers("electra"))
    if has("generator_predictions/"):
        # One network with two heads, or a masked language model alone, is called electra.
        scope = "generator" if has("generator/encoder/") else "electra"
        tables = "generator" if has("generator/embeddings/") else "electra"
        names_of = _electra(has, scope, f"{tables}/embeddings") + _GENERATOR_HEAD
        parts[GENERATOR] = _Part(
            scope, "ElectraForMaskedLM", names_of, layers(scope), derived=scope == "generator"
        )
    return parts


def _bert_class(heads: list[tuple[Name, ...]]) -> str:
    """The class of Transformers with these heads."""
    pooler, masked, sentence = (head in heads for head in _BERT_HEADS)
    if sentence:
        return "BertForPreTraining" if masked else "BertForNextSentencePrediction"
    # The pooler of a masked language model without sentence pairs is dropped, and said so.
    return "BertForMaskedLM" if masked else "BertModel"


def _electra(has: Any, scope: str, embeddings: str) -> tuple[Name, ...]:
    """Names of a network of ELECTRA without its head."""
    wider = f"{scope}/embeddings_project"
    return (
        *_embeddings(embeddings, "electra"),
        *(_dense(wider, "electra.embeddings_project") if has(wider + "/") else ()),
        *_layers(scope, "electra"),
    )


def _check_names(prefix: Path, names: list[str], parts: Iterable[_Part]) -> None:
    """Raises one UserError that lists every tensor left over or missing."""
    expected = {name for part in parts for name in part.expected()}
    problems = [f"left over: {name}" for name in names if name not in expected]
    problems += [f"missing: {name}" for name in sorted(expected.difference(names))]
    if problems:
        raise UserError(
            f"{prefix}: {len(problems)} tensors do not fit what google-research/bert and electra "
            f"write: {'; '.join(problems)}"
        )


def _stated(prefix: Path, config: Path | None) -> dict[str, Any]:
    """What a configuration says, from its file or from beside the checkpoint."""
    if config is not None:
        return read_json(config)
    beside = (prefix.with_name(name) for name in CONFIG_FILES)
    return next((read_json(path) for path in beside if path.is_file()), {})


def _values(
    label: str,
    part: _Part,
    tensors: Mapping[str, np.ndarray],
    stated: Mapping[str, Any],
    place: Path,
) -> dict[str, Any]:
    """Transformers' config.json of a network."""
    base = part.architecture.split("For")[0].removesuffix("Model").lower()

    def shape(name: str) -> tuple[int, ...]:
        return tensors[f"{base}.{name}.weight"].shape

    intermediate, hidden = shape("encoder.layer.0.intermediate.dense")
    vocabulary, embedding = shape("embeddings.word_embeddings")
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": part.layers,
        "intermediate_size": intermediate,
        "max_position_embeddings": shape("embeddings.position_embeddings")[0],
        "type_vocab_size": shape("embeddings.token_type_embeddings")[0],
    }
    if base == "electra":
        sizes["embedding_size"] = embedding
    defaults = {
        "num_attention_heads": max(1, hidden // _HEAD_WIDTH),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
    }
    given = {} if part.derived else {name: stated[name] for name in sizes if name in stated}
    wrong = [f"{n} {given[n]}, not {sizes[n]}" for n in given if given[n] != sizes[n]]
    if wrong:
        raise UserError(f"{place}: the configuration contradicts the {label}: {'; '.join(wrong)}")
    chosen = {name: stated.get(name, default) for name, default in defaults.items()}
    if part.derived:
        chosen["num_attention_heads"] = defaults["num_attention_heads"]
    heads = chosen["num_attention_heads"]
    if not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise UserError(
            f"{place}: {heads!r} attention heads do not divide the {label}'s hidden size {hidden}: "
            "state num_attention_heads in a JSON file and name it by --config"
        )
    return {
        "architectures": [part.architecture],
        "model_type": base,
        **sizes,
        **chosen,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
