"""What a frozen encoder knows about texts: a logistic regression on its hidden states.

Reference: the last exercise of chapter 7 of the Hugging Face course, with the encoder frozen.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from flaxpretrain.conversion.check import locally
from flaxpretrain.data import tokenizers
from flaxpretrain.data.store import Split
from flaxpretrain.data.tokenizers import Tokenizer
from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import model_of
from flaxpretrain.shapes import Bool, Float, Numpy
from flaxpretrain.shapes import Int as IntOf

_ROWS = 64
_LENGTH_STEP = 32
_NEWTON_STEPS = 50
_SETTLED = 1e-8
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Weights of the squared norm to choose from, beside a mean loss in nats."""
_FOLDS = 5


def sentence_features(
    config: Any, params: PyTree, tokenizer: Path | None, texts: Sequence[str]
) -> Float[Numpy, "N D"]:
    """The mean of the hidden states after the last layer over the tokens of each text.

    [CLS] and [SEP] count; a text too long for the model is cut. Computes on one device, in float32.

    Raises:
        UserError: the model is no encoder, or its tokenizer is missing or does not fit.
    """
    if tokenizer is None:
        raise UserError("the model comes without a tokenizer, which a probe needs")
    model = model_of(config.build)
    if not hasattr(model.bind(model.abstract()), "encode"):
        raise UserError(f"a probe needs an encoder; a {config.model_type} has none")
    loaded = tokenizers.load(tokenizer)
    loaded.vocabulary.require("cls", "sep", "pad")
    if loaded.vocabulary.size > config.vocab_size:
        raise UserError(
            f"{tokenizer} has {loaded.vocabulary.size} tokens, but the model only "
            f"{config.vocab_size}: it belongs to another model"
        )
    rows = [_framed(loaded, ids, config.max_length) for ids in token_ids(loaded, texts)]

    @jax.jit
    def means(params: PyTree, ids: Int[Array, "B L"], segments: Int[Array, "B L"]) -> Array:
        module: Any = model.bind(params)
        places = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        hidden = module.encode(module.embed(ids, segments, places), segments)
        counts = jnp.where(segments > 0, 1.0, 0.0)[..., None]
        return jnp.sum(hidden * counts, axis=1) / jnp.maximum(jnp.sum(counts, axis=1), 1.0)

    # Texts of about one length together: less padding, and few shapes to compile.
    order = np.argsort([len(row) for row in rows], kind="stable")
    found = np.zeros((len(rows), config.hidden_size), np.float32)
    pad = int(loaded.vocabulary.pad or 0)
    with locally():
        for begin in range(0, len(rows), _ROWS):
            some = order[begin : begin + _ROWS]
            longest = -(-max(len(rows[i]) for i in some) // _LENGTH_STEP) * _LENGTH_STEP
            ids = np.full((_ROWS, min(longest, config.max_length)), pad, np.int32)
            segments = np.zeros_like(ids)
            for number, i in enumerate(some):
                ids[number, : len(rows[i])], segments[number, : len(rows[i])] = rows[i], 1
            found[some] = np.asarray(means(params, ids, segments))[: len(some)]
    return found


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without special tokens."""
    encoded = tokenizer.backend.encode_batch(list(texts), add_special_tokens=False)
    return [each.ids for each in encoded]


def _framed(tokenizer: Tokenizer, ids: list[int], longest: int) -> list[int]:
    words = tokenizer.vocabulary
    return [int(words.cls or 0), *ids[: longest - 2], int(words.sep or 0)]


def documents_among(split: Split, ids: Sequence[Sequence[int]]) -> Bool[Numpy, " N"]:
    """Which of the texts, as ids, are whole documents of a split."""
    offsets = np.asarray(split.document_offsets, np.int64)
    lengths = np.diff(offsets)
    found = set()
    for begin in range(0, len(lengths), 4096):
        some = slice(begin, begin + 4096)
        width = max(int(lengths[some].max(initial=1)), 1)
        rows, _ = split.gather(offsets[:-1][some], lengths[some], width)
        found |= {tuple(row[:n].tolist()) for row, n in zip(rows, lengths[some], strict=True)}
    return np.array([tuple(text) in found for text in ids], np.bool_)


@dataclasses.dataclass(frozen=True)
class LogisticProbe:
    """Chances of the second of two classes: a sigmoid of a weighted sum of scaled features."""

    weights: Float[Numpy, " D"]
    bias: float
    mean: Float[Numpy, " D"]
    scale: Float[Numpy, " D"]
    strength: float

    def chances(self, features: Float[Numpy, "N D"]) -> Float[Numpy, " N"]:
        """Of being of class 1."""
        return _sigmoid((features - self.mean) / self.scale @ self.weights + self.bias)

    def accuracy(self, features: Float[Numpy, "N D"], labels: IntOf[Numpy, " N"]) -> float:
        """Share of right answers."""
        return float(((self.chances(features) > 0.5) == (labels > 0)).mean())


def fit_probe(
    features: Float[Numpy, "N D"], labels: IntOf[Numpy, " N"], strength: float
) -> LogisticProbe:
    """The regression with the least mean loss plus `strength` times half the squared norm.

    Newton's method in float64 (iteratively reweighted least squares); the minimum is unique.

    Raises:
        UserError: only one of the classes 0 and 1 has texts.
    """
    if set(np.unique(labels).tolist()) != {0, 1}:
        raise UserError("a probe needs texts of both classes")
    mean, scale = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-6)
    x = np.column_stack([(features - mean) / scale, np.ones(len(features))]).astype(np.float64)
    penalty = np.append(np.full(features.shape[1], strength), 0.0)
    weights = np.zeros(x.shape[1])
    for _ in range(_NEWTON_STEPS):
        chances = _sigmoid(x @ weights)
        slope = x.T @ (chances - labels) / len(x) + penalty * weights
        curve = (x.T * (chances * (1 - chances))) @ x / len(x) + np.diag(penalty)
        move = np.linalg.solve(curve + 1e-10 * np.eye(len(curve)), slope)
        weights -= move
        if np.abs(move).max() < _SETTLED:
            break
    return LogisticProbe(weights[:-1], float(weights[-1]), mean, scale, strength)


def choose_strength(
    features: Float[Numpy, "N D"], labels: IntOf[Numpy, " N"], seed: int = 0
) -> float:
    """The one of `STRENGTHS` that is right most often in cross-validation of five folds."""
    fold = np.random.default_rng(seed).permutation(len(labels)) % _FOLDS

    def score(strength: float) -> float:
        right = 0.0
        for number in range(_FOLDS):
            kept, out = fold != number, fold == number
            probe = fit_probe(features[kept], labels[kept], strength)
            right += probe.accuracy(features[out], labels[out]) * out.sum()
        return right

    return max(STRENGTHS, key=score)


def _sigmoid(x: Float[Numpy, " N"]) -> Float[Numpy, " N"]:
    return 0.5 * (1.0 + np.tanh(0.5 * x))
