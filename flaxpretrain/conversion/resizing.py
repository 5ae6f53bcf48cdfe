"""A model for a tokenizer that has more tokens than the model's own: new rows for its tables."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flaxpretrain.conversion.folders import HubModel, config_class
from flaxpretrain.data import tokenizers
from flaxpretrain.data.tokenizers import Tokenizer
from flaxpretrain.errors import UserError
from flaxpretrain.models.names import vocabulary_tensors
from flaxpretrain.shapes import Float, Numpy


def extends(larger: Tokenizer, smaller: Tokenizer) -> bool:
    """Whether one tokenizer has all tokens of the other under the same ids, and more."""
    ours, theirs = larger.backend.get_vocab(), smaller.backend.get_vocab()
    same = all(ours.get(token) == number for token, number in theirs.items())
    return same and larger.vocabulary.size > smaller.vocabulary.size


def resized_for_dataset(
    model: HubModel, dataset: Path, source: str | Path, say: Callable[[str], None]
) -> HubModel:
    """The model, with rows for the tokens that a dataset's tokenizer adds to the model's, if any.

    `dataset` is the folder of its tokenizer. Any other tokenizer leaves the model as it is.
    """
    own = model.tokenizer
    known = own is not None and any((own / n).is_file() for n in ("tokenizer.json", "vocab.txt"))
    if own is None or not known or not (dataset / "tokenizer.json").is_file():
        return model
    larger, smaller = tokenizers.load(dataset), tokenizers.load(own)
    if not extends(larger, smaller):
        return model
    return resized(dataclasses.replace(model, tokenizer=dataset), larger, smaller, source, say)


def resized_for_tokenizer(
    model: HubModel, folder: Path, source: str | Path, say: Callable[[str], None]
) -> HubModel:
    """The model with this tokenizer, which has its tokens and more, and with rows for them.

    Raises:
        UserError: the model has no tokenizer, or the other one does not extend it.
    """
    if model.tokenizer is None:
        raise UserError(f"{source} has no tokenizer: nothing tells which tokens are new to it")
    larger, smaller = tokenizers.load(folder), tokenizers.load(model.tokenizer)
    if not extends(larger, smaller):
        raise UserError(
            f"--tokenizer {folder} does not extend that of {source}: it must have the same tokens "
            "under the same ids, and more; tools/train_tokenizer.py --extend makes one"
        )
    return resized(dataclasses.replace(model, tokenizer=folder), larger, smaller, source, say)


def resized(
    model: HubModel,
    larger: Tokenizer,
    smaller: Tokenizer,
    source: str | Path,
    say: Callable[[str], None],
) -> HubModel:
    """The model with a row for each new token: the mean of those of its pieces before.

    A token whose pieces are unknown gets the mean of all. Tables that are longer than the larger
    tokenizer stay so long. The output layer and its bias grow alike.

    Reference: the mean of the pieces as in Casanueva et al. 2020 and Hewitt 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html, which shows why not to draw them.
    """
    first, count = smaller.vocabulary.size, larger.vocabulary.size
    regular = smaller.vocabulary.regular_ids()
    by_id = {number: token for token, number in larger.backend.get_vocab().items()}
    pieces = [pieces_of(smaller, by_id.get(number, "")) for number in range(first, count)]
    old_size = int(model.values["vocab_size"])
    size = max(old_size, count)
    entries = config_class(model.values.get("model_type")).names
    tensors = dict(model.tensors)
    for name, lying in vocabulary_tensors(model.tensors, entries).items():
        table = np.asarray(tensors[name])
        rows = _with_rows(table[0] if lying else table, first, size, pieces, regular)
        tensors[name] = rows[None] if lying else rows
    say(
        f"{source}: {count - first} new tokens from id {first} on; their embeddings begin as the "
        f"mean of those of their pieces; vocab_size {old_size} -> {size}"
    )
    values = {**model.values, "vocab_size": size}
    return dataclasses.replace(model, values=values, tensors=tensors)


def _with_rows(
    table: np.ndarray, first: int, size: int, pieces: Sequence[Sequence[int]], regular: np.ndarray
) -> Float[Numpy, "..."]:
    """A table of `size` rows, those from `first` on made of the others."""
    rows = np.zeros((size, *table.shape[1:]), np.float32)
    rows[: len(table)] = table
    mean = table[regular].astype(np.float32).mean(0)
    for number, ids in enumerate(pieces, first):
        rows[number] = table[list(ids)].astype(np.float32).mean(0) if ids else mean
    return rows


def pieces_of(tokenizer: Tokenizer, token: str) -> list[int]:
    """The ids into which a tokenizer cuts what a token of another one spells.

    Empty where it does not know a part of it.
    """
    unk = tokenizer.vocabulary.unk
    if token.startswith("##"):
        ids = _pieces_inside_word(tokenizer.backend.get_vocab(), token)
    else:
        ids = [piece.id for piece in tokenizer.backend.model.tokenize(token)]
    return [] if unk in ids else ids


def _pieces_inside_word(ids: dict[str, int], token: str) -> list[int]:
    """The longest pieces from the left, as WordPiece cuts; empty where there are none."""
    found, at = [], 2
    while at < len(token):
        ends = range(len(token), at, -1)
        end = next((end for end in ends if f"##{token[at:end]}" in ids), None)
        if end is None:
            return []
        found.append(ids[f"##{token[at:end]}"])
        at = end
    return found
