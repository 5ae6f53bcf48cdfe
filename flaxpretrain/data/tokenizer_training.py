"""Trains WordPiece, byte-level BPE and Unigram tokenizers from text."""

import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from flaxpretrain.data.backends import (
    add_sentinels,
    byte_bpe_backend,
    frame,
    frame_like_roberta,
    roles_by_name,
    special_token,
    wordpiece_backend,
)
from flaxpretrain.data.normalization import Normalization, joined
from flaxpretrain.data.sentencepiece_model import backend_of, read_model
from flaxpretrain.data.tokenizers import Tokenizer
from flaxpretrain.errors import UserError

BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
T5_TOKENS = ("<pad>", "</s>", "<unk>")
AS_IT_IS = Normalization()
UNCASED = Normalization(lowercase=True)
NFKC = Normalization(form="nfkc")
BATCH = 1000
"""Texts that are handed to a trainer at once."""
LONGEST_TEXT = 1 << 24
"""Bytes of a text that SentencePiece reads; it would leave out longer ones without a word."""


def train_wordpiece(
    texts: Iterable[str],
    vocab_size: int,
    *,
    normalization: Normalization = UNCASED,
    special_tokens: Sequence[str] = BERT_TOKENS,
    min_frequency: int = 2,
    alphabet_limit: int = 1000,
) -> Tokenizer:
    """Trains BERT's kind of tokenizer; the same texts give the same file.

    `texts` is read twice; an iterator, which cannot be, is held in memory. `alphabet_limit` is the
    number of characters kept, the most frequent ones; a word with another one is unknown.

    Raises:
      UserError: no text, or a vocabulary too small for special tokens and characters.

    Reference: huggingface/tokenizers, models/wordpiece/trainer.rs (pairs by frequency, as in BPE).
    """
    texts = texts if not isinstance(texts, Iterator) else list(texts)
    backend = _untrained_wordpiece(special_tokens, normalization)
    counts = _characters(backend, texts)
    alphabet = sorted(_most_frequent(counts)[:alphabet_limit])
    pieces = [*alphabet, *(f"##{character}" for character in alphabet)]
    _check_size(vocab_size, len(special_tokens) + len(pieces))
    return _train_wordpiece(texts, vocab_size, normalization, special_tokens, min_frequency, pieces)


def train_characters(
    texts: Iterable[str],
    vocab_size: int,
    *,
    normalization: Normalization = UNCASED,
    special_tokens: Sequence[str] = BERT_TOKENS,
    min_frequency: int = 2,
) -> Tokenizer:
    """Trains a tokenizer of Chinese characters, like BERT's; the same texts give the same file.

    Every character that occurs `min_frequency` times is a token, the most frequent first, as far
    as the vocabulary goes; what room is left, pieces of words in other scripts take. Unlike in
    `train_wordpiece`, characters that always stand alone (Chinese ones, punctuation) have no "##"
    form, which nothing would ever use. `texts` is read twice, or held in memory.

    Raises:
      UserError: no text, or a vocabulary without room for characters.
    """
    texts = texts if not isinstance(texts, Iterator) else list(texts)
    backend = _untrained_wordpiece(special_tokens, normalization)
    counts = _characters(backend, texts)
    pieces: list[str] = []
    _check_size(vocab_size, len(special_tokens) + 1)
    for character in _most_frequent(counts):
        forms = [character] if _stands_alone(backend, character) else [character, f"##{character}"]
        room = vocab_size - len(special_tokens) - len(pieces)
        if counts[character] < min_frequency or len(forms) > room:
            break
        pieces += forms
    return _train_wordpiece(texts, vocab_size, normalization, special_tokens, min_frequency, pieces)


def _untrained_wordpiece(
    special_tokens: Sequence[str], normalization: Normalization
) -> library.Tokenizer:
    start = {token: number for number, token in enumerate(special_tokens)}
    return wordpiece_backend(start, normalization)


def _train_wordpiece(
    texts: Iterable[str],
    vocab_size: int,
    normalization: Normalization,
    special_tokens: Sequence[str],
    min_frequency: int,
    pieces: Sequence[str],
) -> Tokenizer:
    """Merges pieces of words, from single characters on, which are all named."""
    backend = _untrained_wordpiece(special_tokens, normalization)
    # The library reads its counts out of a hash map with a random seed, which would shuffle the
    # ids of the single characters: name them all, in order, and ids and ties are settled.
    alphabet = [piece for piece in pieces if not piece.startswith("##")]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=False,
        special_tokens=[*special_tokens, *pieces],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix="##",
    )
    backend.train_from_iterator(_batches(texts), trainer)
    # Built anew, or the single characters would stay special tokens.
    vocabulary = backend.get_vocab(with_added_tokens=False)
    ordered = {token: vocabulary[token] for token in sorted(vocabulary, key=vocabulary.__getitem__)}
    backend = wordpiece_backend(ordered, normalization)
    settings = {
        "do_lower_case": normalization.lowercase,
        "strip_accents": normalization.strip_accents,
    }
    return Tokenizer(backend, roles_by_name(ordered), settings)


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    normalization: Normalization = AS_IT_IS,
    special_tokens: Sequence[str] = ROBERTA_TOKENS,
    min_frequency: int = 2,
    add_prefix_space: bool = False,
) -> Tokenizer:
    """Trains a byte-level BPE like GPT-2's; the same texts give the same file.

    With <s> and </s> among the special tokens it frames like RoBERTa: <s> A </s></s> B </s>.

    Raises:
      UserError: no text, or a vocabulary smaller than 256 bytes and the special tokens.
    """
    backend = byte_bpe_backend(models.BPE(), add_prefix_space)
    normalizer = joined(normalization.steps())
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    _check_size(vocab_size, len(special_tokens) + len(alphabet))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=False,
        special_tokens=[special_token(token) for token in special_tokens],
        initial_alphabet=alphabet,
    )
    backend.train_from_iterator(_batches(texts), trainer)
    return Tokenizer(backend, frame_like_roberta(backend, add_prefix_space))


def train_unigram(
    texts: Iterable[str],
    vocab_size: int,
    *,
    normalization: Normalization = NFKC,
    special_tokens: Sequence[str] = T5_TOKENS,
    sentinels: int = 0,
) -> Tokenizer:
    """Trains a Unigram model like SentencePiece's, "▁" for a space, without SentencePiece.

    `special_tokens` hold one unknown token. `sentinels` tokens <extra_id_0>, ... take the last
    ids, descending, and count in `vocab_size`. With a cls and a sep token the tokenizer frames
    like BERT, else with an eos token it appends that one, like T5.

    The library's trainer sums in the order of a hash map with a random seed: two runs give scores
    that differ a little, and so may a rare piece. `train_sentencepiece` gives the same file.

    Raises:
      UserError: no text, no unknown token, or a vocabulary too small.

    Reference: Kudo 2018, https://arxiv.org/abs/1804.10959, as huggingface/tokenizers trains it.
    """
    unknown = _unknown(special_tokens)
    _check_size(vocab_size, len(special_tokens) + sentinels + 1)
    backend = library.Tokenizer(models.Unigram())
    spaces = normalizers.Replace(library.Regex(" {2,}"), " ")
    backend.normalizer = normalizers.Sequence([*normalization.steps(), spaces])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - sentinels,
        show_progress=False,
        special_tokens=[special_token(token) for token in special_tokens],
        unk_token=unknown,
    )
    backend.train_from_iterator(_batches(texts), trainer)
    add_sentinels(backend, sentinels)
    roles = roles_by_name(backend.get_vocab())
    frame(backend, roles)
    return Tokenizer(backend, roles)


class TrainedPieces(NamedTuple):
    """A tokenizer, and SentencePiece's own file where that alone gives the same tokens."""

    tokenizer: Tokenizer
    model: bytes | None


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    *,
    kind: str = "unigram",
    normalization: Normalization = NFKC,
    special_tokens: Sequence[str] = T5_TOKENS,
    sentinels: int = 0,
    character_coverage: float = 0.9995,
) -> TrainedPieces:
    """Trains by SentencePiece, a Unigram model or a BPE; the same texts give the same file.

    NFKC, with or without lower case, is SentencePiece's own (nmt_nfkc, nmt_nfkc_cf); other
    normalisations come before its model. `character_coverage` is the share of the text's
    characters that are tokens; the others are unknown. Else as `train_unigram`.

    Raises:
      UserError: no text, no unknown token, or a vocabulary too small.
    """
    import sentencepiece

    _unknown(special_tokens)
    _check_size(vocab_size, len(special_tokens) + sentinels + 1)
    if not 0 < character_coverage <= 1:
        raise UserError(f"--character-coverage is above 0 and at most 1; got {character_coverage}")
    native = normalization in (NFKC, Normalization("nfkc", lowercase=True), AS_IT_IS)
    rule = "identity"
    if native and normalization.form:
        rule = "nmt_nfkc_cf" if normalization.lowercase else "nmt_nfkc"
    before = AS_IT_IS if native else normalization
    normalizer = joined(before.steps())
    normalize = (lambda text: text) if normalizer is None else normalizer.normalize_str
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_normalized(texts, normalize),
            model_writer=written,
            model_type=kind,
            vocab_size=vocab_size - sentinels,
            hard_vocab_limit=False,
            character_coverage=character_coverage,
            normalization_rule_name=rule,
            max_sentence_length=LONGEST_TEXT,
            # Sums are in the order of the threads: their number is part of the result.
            num_threads=8,
            minloglevel=2,
            **_piece_ids(special_tokens),
        )
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1].split("] ")[-1]
        raise UserError(f"SentencePiece cannot train this vocabulary: {reason}") from None
    with TemporaryDirectory() as folder:
        path = Path(folder) / "spiece.model"
        path.write_bytes(written.getvalue())
        tokenizer = Tokenizer(*backend_of(read_model(path), before, sentinels))
    return TrainedPieces(tokenizer, written.getvalue() if native else None)


def _piece_ids(special_tokens: Sequence[str]) -> dict[str, Any]:
    """SentencePiece's settings that give the special tokens the ids 0, 1, ... in their order."""
    roles = roles_by_name({token: number for number, token in enumerate(special_tokens)})
    settings: dict[str, Any] = {}
    taken = set()
    for role in ("unk", "bos", "eos", "pad"):
        token = roles.get(role)
        settings[f"{role}_id"] = -1 if token is None else special_tokens.index(token)
        if token is not None:
            settings[f"{role}_piece"] = token
            taken.add(token)
    settings["control_symbols"] = [token for token in special_tokens if token not in taken]
    return settings


def _unknown(special_tokens: Sequence[str]) -> str:
    unknown = roles_by_name(dict.fromkeys(special_tokens, 0)).get("unk")
    if unknown is None:
        raise UserError(f"a Unigram tokenizer needs <unk> or [UNK]; got {list(special_tokens)}")
    return unknown


def _normalized(texts: Iterable[str], normalize: Callable[[str], str]) -> Iterator[str]:
    for batch in _batches(texts):
        yield from map(normalize, batch)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists, which the library reads faster.

    Raises:
      UserError: there is no text at all.
    """
    texts = iter(texts)
    empty = True
    while batch := list(itertools.islice(texts, BATCH)):
        empty = False
        yield batch
    if empty:
        raise UserError("there is no text to train a tokenizer from")


def _characters(backend: library.Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """How often each character stands in the normalised text."""
    raw: Counter[str] = Counter()
    for batch in _batches(texts):
        raw.update("".join(batch))
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        for part in backend.normalizer.normalize_str(character):
            if not part.isspace():
                counts[part] += count
    return counts


def _most_frequent(counts: Counter[str]) -> list[str]:
    """Characters by falling frequency; ties go by code point."""
    return sorted(counts, key=lambda character: (-counts[character], character))


def _stands_alone(backend: library.Tokenizer, character: str) -> bool:
    """Whether a character is a word of its own even inside a word."""
    text = backend.normalizer.normalize_str(f"a{character}a")
    parts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return all(part == character for part in parts if character in part)


def _check_size(vocab_size: int, least: int) -> None:
    if vocab_size < least:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: special tokens and single characters "
            f"take {least}; raise --vocab-size"
        )
