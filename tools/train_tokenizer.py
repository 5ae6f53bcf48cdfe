"""Trains a tokenizer from text, or adds a domain's tokens to one; says how well it fits.

    python tools/train_tokenizer.py --corpus-dir TEXTS --model wordpiece --vocab-size 30000 \\
        --output-dir TOKENIZER
    python tools/train_tokenizer.py --source interpreter --model bpe --vocab-size 8000 \\
        --output-dir TOKENIZER
    python tools/train_tokenizer.py --extend bert-base-uncased/vocab.txt --corpus-dir FILMS \\
        --vocab-size 31500 --output-dir TOKENIZER --report films=FILMS --report wiki=WIKI

wordpiece is like BERT's, bpe like RoBERTa's, characters like that of Chinese BERTs, unigram and
sentencepiece-bpe like T5's and Llama's, by SentencePiece. The folder is what
tools/build_pretraining_dataset.py --tokenizer takes, and what Transformers'
AutoTokenizer.from_pretrained loads. After --extend, all tokens keep their ids, and
run_pretraining.py --init-from fits the model's embeddings to the new ones.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flaxpretrain import program
from flaxpretrain.data import fertility, tokenizers
from flaxpretrain.data.document import Losses, told
from flaxpretrain.data.interpreter import InterpreterText
from flaxpretrain.data.normalization import FORMS, Normalization
from flaxpretrain.data.progress import ReadingProgress
from flaxpretrain.data.sources import Source, text_files
from flaxpretrain.data.tokenizer_extension import extend
from flaxpretrain.data.tokenizer_training import (
    train_bpe,
    train_characters,
    train_sentencepiece,
    train_unigram,
    train_wordpiece,
)
from flaxpretrain.data.tokenizers import Tokenizer
from flaxpretrain.errors import UserError
from flaxpretrain.locations import given

MODELS = ("wordpiece", "characters", "bpe", "unigram", "sentencepiece-bpe")
BERT_LIKE = ("wordpiece", "characters")
PIECES_FILE = "spiece.model"
"""What SentencePiece itself reads."""


class Sentences:
    """The sentences of sources, as often as they are asked for.

    `losses` is what the newest reading of each source left out; the first reading tells `notify`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        progress: Callable[[int], None] = lambda count: None,
        skip_broken: bool = False,
        notify: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._sources = sources
        self._progress = progress
        self._skip_broken = skip_broken
        self._notify = notify
        self.losses: list[Losses] = []

    def __iter__(self) -> Iterator[str]:
        notify = (lambda message: None) if self.losses else self._notify
        self.losses = [Losses(self._skip_broken, notify) for _ in self._sources]
        for source, losses in zip(self._sources, self.losses, strict=True):
            for document in source.documents(self._progress, losses):
                yield from document.sentences


def say(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr)


def parser() -> program.Parser:
    """The arguments."""
    parser = program.Parser(__doc__)
    add = parser.add_argument
    add("--corpus-dir", "--files", dest="corpus", type=given, nargs="+", action="extend",
        metavar="PATH", default=[], help="text files or folders of them; .gz too")  # fmt: skip
    add("--source", choices=["interpreter"], help="text that ships with Python")
    family = parser.add_mutually_exclusive_group()
    family.add_argument("--model", choices=MODELS, default="wordpiece", help="family to train")
    family.add_argument("--extend", metavar="TOKENIZER",
        help="add tokens to this one: a file, a folder or a hub id")  # fmt: skip
    add("--vocab-size", type=int, required=True, help="ids, special tokens included")
    add("--output-dir", type=program.output_folder, required=True, help="the tokenizer's folder")
    case = parser.add_mutually_exclusive_group()
    case.add_argument("--lowercase", action="store_true",
        help="default for wordpiece and characters")  # fmt: skip
    case.add_argument("--no-lowercase", dest="lowercase", action="store_false", help="keep case")
    accents = parser.add_mutually_exclusive_group()
    accents.add_argument("--strip-accents", action="store_true",
        help="wordpiece, characters: default as the case")  # fmt: skip
    accents.add_argument("--no-strip-accents", dest="strip_accents", action="store_false")
    parser.set_defaults(lowercase=None, strip_accents=None)
    add("--turkish-i", action="store_true", help="lower case of I is ı, that of İ is i")
    add("--unicode", choices=[*FORMS, "none"],
        help="normal form (default: nfkc where SentencePiece trains)")  # fmt: skip
    add("--special-tokens", nargs="+", metavar="TOKEN", help="none: those of the family")
    add("--min-frequency", type=int, default=2, help="of a pair that is merged")
    add("--alphabet-limit", type=int, default=1000, help="characters kept, for wordpiece")
    add("--trainer", choices=["sentencepiece", "tokenizers"], default="sentencepiece",
        help="of unigram; only SentencePiece's gives the same file every time")  # fmt: skip
    add("--character-coverage", type=float, default=0.9995,
        help="share of the characters that are tokens, for SentencePiece")  # fmt: skip
    add("--sentinels", type=int, default=0,
        help="<extra_id_...> tokens for T5; unigram and sentencepiece-bpe only")  # fmt: skip
    add("--report", action="append", default=[], metavar="NAME=PATH",
        help="measure the tokenizer on this text too (es=valid.es.txt); repeatable")  # fmt: skip
    add("--errors", choices=["strict", "replace"], default="strict", help="about bad UTF-8")
    add("--skip-broken", action="store_true",
        help="leave out and count what cannot be read, instead of stopping")  # fmt: skip
    add("--overwrite", action="store_true", help="replace a tokenizer that is there")
    return parser


def normalization_of(arguments: argparse.Namespace) -> Normalization:
    """How the family normalises, with what was asked for."""
    bert = arguments.model in BERT_LIKE
    form = arguments.unicode or (None if bert or arguments.model == "bpe" else "nfkc")
    return Normalization(
        None if form == "none" else form,
        bert if arguments.lowercase is None else arguments.lowercase,
        arguments.strip_accents,
        arguments.turkish_i,
    )


def train(arguments: argparse.Namespace, texts: Sentences) -> tuple[Tokenizer, bytes | None]:
    """Trains the family that was asked for; with SentencePiece's own file, where there is one."""
    size, model = arguments.vocab_size, arguments.model
    shared = {"normalization": normalization_of(arguments)}
    if arguments.special_tokens is not None:
        shared["special_tokens"] = arguments.special_tokens
    pairs = {"min_frequency": arguments.min_frequency}
    if model in (*BERT_LIKE, "bpe") and arguments.sentinels:
        raise UserError(f"--sentinels goes with --model unigram, not {model}")
    if model == "wordpiece":
        limit = arguments.alphabet_limit
        return train_wordpiece(texts, size, alphabet_limit=limit, **pairs, **shared), None
    if model == "characters":
        return train_characters(texts, size, **pairs, **shared), None
    if model == "bpe":
        return train_bpe(texts, size, **pairs, **shared), None
    shared["sentinels"] = arguments.sentinels
    if model == "unigram" and arguments.trainer == "tokenizers":
        return train_unigram(texts, size, **shared), None
    return train_sentencepiece(
        texts,
        size,
        kind="unigram" if model == "unigram" else "bpe",
        character_coverage=arguments.character_coverage,
        **shared,
    )


def extended(arguments: argparse.Namespace, texts: Sentences) -> Tokenizer:
    """The tokenizer of --extend with more tokens; says which.

    Raises:
        UserError: an option that only training takes.
    """
    for name in ("special_tokens", "unicode"):
        if getattr(arguments, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is for training: --extend keeps the tokenizer's own"
            )
    base = tokenizers.load(
        arguments.extend,
        arguments.lowercase,
        arguments.strip_accents,
        sentinels=arguments.sentinels,
    )
    found = extend(base, texts, arguments.vocab_size, min_frequency=arguments.min_frequency)
    shown = ", ".join(found.added[:12]) + (", ..." if len(found.added) > 12 else "")
    print(
        f"{arguments.extend}: {base.vocabulary.size:,} ids stay; {len(found.added):,} new: {shown}"
    )
    return found.tokenizer


def report(arguments: argparse.Namespace, tokenizer: Tokenizer, sources: Sequence[Source]) -> None:
    """Prints how the tokenizer fits the texts it was trained from and those of --report."""
    named = {source.name: source for source in sources}
    for entry in arguments.report:
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise UserError(f"--report takes NAME=PATH, such as es=valid.es.txt; got {entry!r}")
        named[name] = text_files(given(path), errors=arguments.errors)
    figures = [
        fertility.measure(tokenizer, name, Sentences([source], skip_broken=arguments.skip_broken))
        for name, source in named.items()
    ]
    for line in fertility.table(figures):
        print(line)


def main(argv: list[str]) -> None:
    """Trains the tokenizer, saves it and shows a sentence cut into its tokens."""
    arguments = parser().parse_args(argv)
    sources: list[Source] = [text_files(path, errors=arguments.errors) for path in arguments.corpus]
    if arguments.source:
        sources.append(InterpreterText())
    if not sources:
        raise UserError("no text: give --corpus-dir PATH, --files PATH or --source interpreter")
    if (arguments.output_dir / "tokenizer.json").exists() and not arguments.overwrite:
        raise UserError(
            f"{arguments.output_dir} holds a tokenizer: pass --overwrite to replace it, "
            "or give another --output-dir"
        )
    # Twice: first for the characters.
    passes = 2 if arguments.model in BERT_LIKE and not arguments.extend else 1
    total = passes * sum(source.size() for source in sources)
    with ReadingProgress("training", total) as progress:
        texts = Sentences(sources, progress.advance, arguments.skip_broken, say)
        if arguments.extend is not None:
            tokenizer, pieces = extended(arguments, texts), None
        else:
            tokenizer, pieces = train(arguments, texts)
    try:
        tokenizer.save(arguments.output_dir)
        if pieces is not None:
            (arguments.output_dir / PIECES_FILE).write_bytes(pieces)
    except OSError as error:
        raise UserError(f"cannot write {arguments.output_dir}: {error.strerror}") from error
    vocabulary = tokenizer.vocabulary
    print(f"tokenizer {arguments.output_dir}: {vocabulary.size:,} ids of {arguments.vocab_size:,}")
    print("special: " + ", ".join(f"{role} {token}" for role, token in tokenizer.roles.items()))
    for source, losses in zip(sources, texts.losses, strict=True):
        for line in told(source.name, losses.counts()):
            print(line)
    report(arguments, tokenizer, sources)
    sample = next(iter(Sentences(sources, skip_broken=arguments.skip_broken)))
    print("sample: " + " ".join(tokenizer.backend.encode(sample[:200]).tokens))


if __name__ == "__main__":
    program.run(main)
