"""Reads SentencePiece's `.model` files into the `tokenizers` library, without SentencePiece.

The result cuts text as SentencePiece does: its normaliser's table, spaces and pieces are taken
over as they are.
"""

import dataclasses
from pathlib import Path
from typing import Any

import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from flaxpretrain.data.backends import add_sentinels, frame, roles_by_name, special_token
from flaxpretrain.data.normalization import Normalization, joined
from flaxpretrain.data.protobuf import as_float, as_signed, fields
from flaxpretrain.errors import UserError

SPACE = "▁"
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A token, how good it is, and what it is."""

    text: str
    score: float
    kind: int


@dataclasses.dataclass(frozen=True)
class PieceModel:
    """What a `.model` file holds, as far as it takes to cut text.

    Reference: google/sentencepiece src/sentencepiece_model.proto.
    """

    pieces: tuple[Piece, ...]
    kind: int
    """1: Unigram; 2: BPE."""
    byte_fallback: bool
    stated: dict[str, int]
    """Ids of unk, bos, eos and pad that the trainer was told; -1 is none."""
    character_map: bytes
    """The normaliser's table; empty: none."""
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_model(path: Path) -> PieceModel:
    """Reads a `.model` file.

    Raises:
      UserError: it is none, or of a kind that the library cannot cut alike.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        model = _parsed(content)
    except (IndexError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no SentencePiece model, or damaged ({error})") from None
    if not model.pieces:
        raise UserError(f"{path} is no SentencePiece model: it holds no pieces")
    if model.kind not in (_UNIGRAM, _BPE):
        raise UserError(
            f"{path}: SentencePiece's Unigram and BPE can be read, words and characters not"
        )
    if sum(piece.kind == _UNKNOWN for piece in model.pieces) != 1:
        raise UserError(f"{path}: a SentencePiece model has one unknown token; this one has not")
    return model


def _parsed(content: bytes) -> PieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in fields(content):
        if number == 1:
            entry = dict(fields(value))
            score = as_float(entry.get(2, 0))
            pieces.append(Piece(entry.get(1, b"").decode("utf-8"), score, entry.get(3, _NORMAL)))
        elif number == 2:
            trainer = dict(fields(value))
        elif number == 3:
            normalizer = dict(fields(value))
    if trainer.get(24, 0):
        raise ValueError("it treats spaces as the end of words, which cannot be read")
    ids = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}
    return PieceModel(
        tuple(pieces),
        trainer.get(3, _UNIGRAM),
        bool(trainer.get(35, 0)),
        {role: as_signed(trainer.get(n, default)) for role, (n, default) in ids.items()},
        normalizer.get(2, b""),
        bool(normalizer.get(3, 1)),
        bool(normalizer.get(4, 1)),
    )


def roles_of(model: PieceModel) -> dict[str, str]:
    """The roles of special tokens: by their spelling, then by the ids that the trainer was told."""
    reserved = {
        piece.text: number
        for number, piece in enumerate(model.pieces)
        if piece.kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    }
    roles = roles_by_name(reserved)
    for role, number in model.stated.items():
        if 0 <= number < len(model.pieces) and model.pieces[number].kind in (_UNKNOWN, _CONTROL):
            roles.setdefault(role, model.pieces[number].text)
    roles["unk"] = next(piece.text for piece in model.pieces if piece.kind == _UNKNOWN)
    return roles


def backend_of(
    model: PieceModel, normalization: Normalization, sentinels: int = 0
) -> tuple[library.Tokenizer, dict[str, str]]:
    """The library's tokenizer, and the roles of its special tokens.

    `normalization` comes before the model's own, as ALBERT's lower case does; `sentinels` tokens
    <extra_id_0>, ... are added behind all others, as T5 has them.
    """
    backend = library.Tokenizer(_unigram(model) if model.kind == _UNIGRAM else _bpe(model))
    backend.normalizer = joined([*normalization.steps(), *_normalizers(model)])
    inner = any(SPACE in piece.text.lstrip(SPACE) for piece in model.pieces)
    if not inner:
        # Words are cut one by one, and each is remembered: the same tokens, and faster.
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never")
    backend.decoder = _decoder(model)
    roles = roles_of(model)
    for piece in model.pieces:
        named = piece.text in roles.values()
        if named or piece.kind in (_UNKNOWN, _CONTROL, _UNUSED):
            backend.add_special_tokens([special_token(piece.text)])
        elif piece.kind == _USER_DEFINED and model.kind == _BPE:
            backend.add_tokens([library.AddedToken(piece.text, normalized=False)])
    add_sentinels(backend, sentinels)
    frame(backend, roles)
    return backend, roles


def _normalizers(model: PieceModel) -> list[normalizers.Normalizer]:
    """SentencePiece's treatment of text before it is cut.

    Reference: Normalizer::Normalize, google/sentencepiece src/normalizer.cc.
    """
    steps: list[normalizers.Normalizer] = []
    if model.character_map:
        steps.append(normalizers.Precompiled(model.character_map))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(library.Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(library.Regex(" {2,}"), " "))
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    steps.append(normalizers.Replace(" ", SPACE))
    return steps


def _decoder(model: PieceModel) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if model.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _unigram(model: PieceModel) -> models.Unigram:
    """The model, where pieces that its user defined win over all others, as they should.

    Reference: Model::EncodeOptimized, google/sentencepiece src/unigram_model.cc.
    """
    best = max((piece.score for piece in model.pieces if piece.kind == _NORMAL), default=0.0)
    entries = [
        (
            piece.text,
            len(piece.text.encode()) * best - 0.1 if piece.kind == _USER_DEFINED else piece.score,
        )
        for piece in model.pieces
    ]
    unknown = next(n for n, piece in enumerate(model.pieces) if piece.kind == _UNKNOWN)
    return models.Unigram(entries, unknown, model.byte_fallback)


def _bpe(model: PieceModel) -> models.BPE:
    """The model with its merges, which SentencePiece does not store: pairs that make a piece."""
    ids = {piece.text: n for n, piece in enumerate(model.pieces) if piece.kind == _NORMAL}
    pairs = [
        (-model.pieces[n].score, len(text[:cut]), len(text), text[:cut], text[cut:])
        for text, n in ids.items()
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    merges = [(left, right) for *_, left, right in sorted(pairs)]
    unknown = next(piece.text for piece in model.pieces if piece.kind == _UNKNOWN)
    return models.BPE(
        {piece.text: n for n, piece in enumerate(model.pieces)},
        merges,
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )
