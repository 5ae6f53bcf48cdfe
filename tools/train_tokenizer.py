"""Trains a tokenizer from text: WordPiece like BERT's, byte-level BPE like RoBERTa's, or Unigram.

    python tools/train_tokenizer.py --corpus-dir TEXTS --model wordpiece --vocab-size 30000 \\
        --output-dir TOKENIZER
    python tools/train_tokenizer.py --source interpreter --model bpe --vocab-size 8000 \\
        --output-dir TOKENIZER

The folder is what tools/build_pretraining_dataset.py --tokenizer takes, and what Transformers'
AutoTokenizer.from_pretrained loads.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flaxpretrain import program
from flaxpretrain.data.interpreter import InterpreterText
from flaxpretrain.data.progress import ReadingProgress
from flaxpretrain.data.sources import Source, text_files
from flaxpretrain.data.tokenizer_training import train_bpe, train_unigram, train_wordpiece
from flaxpretrain.data.tokenizers import Tokenizer
from flaxpretrain.errors import UserError


class Sentences:
    """The sentences of sources, as often as they are asked for."""

    def __init__(self, sources: Sequence[Source], progress: Callable[[int], None]) -> None:
        self._sources = sources
        self._progress = progress

    def __iter__(self) -> Iterator[str]:
        for source in self._sources:
            for document in source.documents(self._progress):
                yield from document.sentences


def parser() -> program.Parser:
    """The arguments."""
    parser = program.Parser(__doc__)
    add = parser.add_argument
    add("--corpus-dir", "--files", dest="corpus", type=Path, nargs="+", action="extend",
        metavar="PATH", default=[], help="text files or folders of them; .gz too")  # fmt: skip
    add("--source", choices=["interpreter"], help="text that ships with Python")
    add("--model", choices=["wordpiece", "bpe", "unigram"], default="wordpiece", help="family")
    add("--vocab-size", type=int, required=True, help="ids, special tokens included")
    add("--output-dir", type=Path, required=True, help="the tokenizer's folder")
    case = parser.add_mutually_exclusive_group()
    case.add_argument("--lowercase", action="store_true", help="default for wordpiece")
    case.add_argument("--no-lowercase", dest="lowercase", action="store_false", help="keep case")
    accents = parser.add_mutually_exclusive_group()
    accents.add_argument("--strip-accents", action="store_true", help="wordpiece only")
    accents.add_argument("--no-strip-accents", dest="strip_accents", action="store_false")
    parser.set_defaults(lowercase=None, strip_accents=None)
    add("--special-tokens", nargs="+", metavar="TOKEN", help="none: those of the family")
    add("--min-frequency", type=int, default=2, help="of a pair that is merged")
    add("--alphabet-limit", type=int, default=1000, help="characters kept; wordpiece only")
    add("--sentinels", type=int, default=0, help="<extra_id_...> tokens; unigram only")
    add("--errors", choices=["strict", "replace"], default="strict", help="about bad UTF-8")
    add("--overwrite", action="store_true", help="replace a tokenizer that is there")
    return parser


def train(arguments: argparse.Namespace, texts: Sentences) -> Tokenizer:
    """Trains the family that was asked for."""
    lowercase = arguments.lowercase
    special = arguments.special_tokens
    shared = {} if special is None else {"special_tokens": special}
    if arguments.model == "wordpiece":
        return train_wordpiece(
            texts,
            arguments.vocab_size,
            lowercase=True if lowercase is None else lowercase,
            strip_accents=arguments.strip_accents,
            min_frequency=arguments.min_frequency,
            alphabet_limit=arguments.alphabet_limit,
            **shared,
        )
    if arguments.strip_accents is not None:
        raise UserError(f"--strip-accents goes with --model wordpiece, not {arguments.model}")
    shared["lowercase"] = bool(lowercase)
    if arguments.model == "bpe":
        frequency = arguments.min_frequency
        return train_bpe(texts, arguments.vocab_size, min_frequency=frequency, **shared)
    return train_unigram(texts, arguments.vocab_size, sentinels=arguments.sentinels, **shared)


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
    # WordPiece reads the text twice: first for its characters.
    passes = 2 if arguments.model == "wordpiece" else 1
    total = passes * sum(source.size() for source in sources)
    with ReadingProgress("training", total) as progress:
        texts = Sentences(sources, progress.advance)
        tokenizer = train(arguments, texts)
    try:
        tokenizer.save(arguments.output_dir)
    except OSError as error:
        raise UserError(f"cannot write {arguments.output_dir}: {error.strerror}") from error
    vocabulary = tokenizer.vocabulary
    print(f"tokenizer {arguments.output_dir}: {vocabulary.size:,} ids of {arguments.vocab_size:,}")
    print("special: " + ", ".join(f"{role} {token}" for role, token in tokenizer.roles.items()))
    sample = next(iter(Sentences(sources, lambda count: None)))
    print("sample: " + " ".join(tokenizer.backend.encode(sample[:200]).tokens))


if __name__ == "__main__":
    program.run(main)
