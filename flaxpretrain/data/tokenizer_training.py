"""Trains WordPiece, byte-level BPE and Unigram tokenizers from text."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from flaxpretrain.data.tokenizers import (
    Tokenizer,
    byte_bpe_backend,
    frame_like_roberta,
    framing_processor,
    roles_by_name,
    special_token,
    wordpiece_backend,
)
from flaxpretrain.errors import UserError

BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
T5_TOKENS = ("<pad>", "</s>", "<unk>")
BATCH = 1000
"""Texts that are handed to a trainer at once."""


def train_wordpiece(
    texts: Iterable[str],
    vocab_size: int,
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    special_tokens: Sequence[str] = BERT_TOKENS,
    min_frequency: int = 2,
    alphabet_limit: int = 1000,
) -> Tokenizer:
    """Trains BERT's kind of tokenizer; the same texts give the same file.

    `texts` is read twice; an iterator, which cannot be, is held in memory. `alphabet_limit` is the
    number of characters kept, the most frequent ones; a word with another one is unknown.
    `strip_accents` None means: as `lowercase`.

    Raises:
      UserError: no text, or a vocabulary too small for special tokens and characters.

    Reference: huggingface/tokenizers, models/wordpiece/trainer.rs (pairs by frequency, as in BPE).
    """
    specials = list(special_tokens)
    start = {token: number for number, token in enumerate(specials)}
    backend = wordpiece_backend(start, lowercase, strip_accents)
    texts = texts if not isinstance(texts, Iterator) else list(texts)
    # The library reads its counts out of a hash map with a random seed, which would shuffle the
    # ids of the single characters: name them all, in order, and ids and ties are settled.
    alphabet = _alphabet(backend, texts, alphabet_limit)
    pieces = [*alphabet, *(f"##{character}" for character in alphabet)]
    _check_size(vocab_size, len(specials) + len(pieces))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=False,
        special_tokens=specials + pieces,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix="##",
    )
    backend.train_from_iterator(_batches(texts), trainer)
    # Built anew, or the single characters would stay special tokens.
    vocabulary = backend.get_vocab(with_added_tokens=False)
    ordered = {token: vocabulary[token] for token in sorted(vocabulary, key=vocabulary.__getitem__)}
    backend = wordpiece_backend(ordered, lowercase, strip_accents)
    settings = {"do_lower_case": lowercase, "strip_accents": strip_accents}
    return Tokenizer(backend, roles_by_name(ordered), settings)


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    lowercase: bool = False,
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
    if lowercase:
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
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
    lowercase: bool = False,
    special_tokens: Sequence[str] = T5_TOKENS,
    sentinels: int = 0,
) -> Tokenizer:
    """Trains a Unigram model like SentencePiece's: NFKC, "▁" for a space.

    `special_tokens` hold one unknown token. `sentinels` tokens <extra_id_0>, ... take the last
    ids, descending, and count in `vocab_size`. With a cls and a sep token the tokenizer frames
    like BERT, else with an eos token it appends that one, like T5.

    The library's trainer sums in the order of a hash map with a random seed: two runs give scores
    that differ a little, and so may a rare piece. Keep the file, not the command.

    Raises:
      UserError: no text, no unknown token, or a vocabulary too small.

    Reference: Kudo 2018, https://arxiv.org/abs/1804.10959, as huggingface/tokenizers trains it.
    """
    unknown = roles_by_name(dict.fromkeys(special_tokens, 0)).get("unk")
    if unknown is None:
        raise UserError(f"a Unigram tokenizer needs <unk> or [UNK]; got {list(special_tokens)}")
    _check_size(vocab_size, len(special_tokens) + sentinels + 1)
    backend = library.Tokenizer(models.Unigram())
    steps = [normalizers.NFKC(), normalizers.Replace(library.Regex(" {2,}"), " ")]
    backend.normalizer = normalizers.Sequence(
        [*steps, normalizers.Lowercase()] if lowercase else steps
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - sentinels,
        show_progress=False,
        special_tokens=[special_token(token) for token in special_tokens],
        unk_token=unknown,
    )
    backend.train_from_iterator(_batches(texts), trainer)
    names = [f"<extra_id_{number}>" for number in reversed(range(sentinels))]
    backend.add_special_tokens([library.AddedToken(name, special=True) for name in names])
    roles = roles_by_name(backend.get_vocab())
    if "cls" in roles and "sep" in roles:
        backend.post_processor = framing_processor(backend, roles["cls"], roles["sep"])
    elif "eos" in roles:
        eos = roles["eos"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {eos}",
            pair=f"$A {eos} $B {eos}",
            special_tokens=[(eos, backend.token_to_id(eos))],
        )
    return Tokenizer(backend, roles)


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


def _alphabet(backend: library.Tokenizer, texts: Iterable[str], limit: int) -> list[str]:
    """The most frequent characters of the normalised text, sorted; ties go by code point."""
    characters: Counter[str] = Counter()
    for batch in _batches(texts):
        characters.update("".join(batch))
    counts: Counter[str] = Counter()
    for character, count in characters.items():
        for part in backend.normalizer.normalize_str(character):
            if not part.isspace():
                counts[part] += count
    kept = sorted(counts, key=lambda character: (-counts[character], character))[:limit]
    return sorted(kept)


def _check_size(vocab_size: int, least: int) -> None:
    if vocab_size < least:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: special tokens and single characters "
            f"take {least}; raise --vocab-size"
        )
