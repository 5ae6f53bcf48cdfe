"""Builds a pretraining dataset: text -> documents -> tokens -> one flat stream in shards.

    python tools/build_pretraining_dataset.py --corpus-dir TEXTS --vocab-file vocab.txt \\
        --output-dir DATA --num-processes 8
    python tools/build_pretraining_dataset.py --source hf:org/name:config:train \\
        --held-out validation=hf:org/name:config:validation --tokenizer TOKENIZER --output-dir DATA

The dataset holds every token of the text and fits every row length and objective; rows are made
when it is read. It is the same, byte for byte, for any number of processes and any layout of the
text in files. An interrupted build goes on when the same command is run again.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flaxpretrain import program
from flaxpretrain.data import summary, tokenizers
from flaxpretrain.data.building import COMPATIBLE, BuildSettings, Provenance, build
from flaxpretrain.data.interpreter import InterpreterText
from flaxpretrain.data.library_sources import named_source
from flaxpretrain.data.merging import merge, part_folder, part_of
from flaxpretrain.data.progress import ReadingProgress
from flaxpretrain.data.records import Columns
from flaxpretrain.data.sources import FORMATS, Sampled, Source, TextFiles, text_files
from flaxpretrain.data.store import Dataset, partial_folder
from flaxpretrain.data.word_starts import SEGMENTERS
from flaxpretrain.errors import UserError
from flaxpretrain.locations import Location, given, is_remote

TOKENIZER_FILES = (
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""What Transformers saves of a WordPiece tokenizer."""


def truth(text: str) -> bool:
    """True or False as people spell them: `--blanks-separate-docs False` means false."""
    if text.lower() in ("true", "1", "yes", "y"):
        return True
    if text.lower() in ("false", "0", "no", "n"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False; got {text!r}")


def parser() -> program.Parser:
    """The arguments; those that google-research/electra has are spelled as there."""
    parser = program.Parser(__doc__)
    add = parser.add_argument
    add("--corpus-dir", type=given, action="append", metavar="PATH", help=PATH_HELP)
    add("--source", action="append", metavar="NAME", help=SOURCE_HELP)
    add("--held-out", action="append", metavar="SPLIT=TEXT", default=[], help=HELD_OUT_HELP)
    add("--output-dir", type=program.output_folder, required=True, help="the dataset's folder")

    group = parser.add_mutually_exclusive_group()
    group.add_argument("--vocab-file", help="a WordPiece vocab.txt")
    group.add_argument("--tokenizer",
        help="tokenizer.json, SentencePiece .model, a tokenizer folder or hub name")  # fmt: skip
    add(
        "--sentinels", type=int, default=0, help="<extra_id_...> tokens to add, 100 for T5's .model"
    )
    case = parser.add_mutually_exclusive_group()
    case.add_argument("--do-lower-case", dest="lowercase", action="store_true", help=CASE_HELP)
    case.add_argument("--no-lower-case", dest="lowercase", action="store_false", help="keep case")
    accents = parser.add_mutually_exclusive_group()
    accents.add_argument(
        *("--strip-accents", "--do-strip-accents"), action="store_true", help=ACCENTS_HELP
    )
    accents.add_argument("--no-strip-accents", dest="strip_accents", action="store_false")
    parser.set_defaults(lowercase=None, strip_accents=None)

    add("--format", choices=FORMATS, help=FORMAT_HELP)
    add("--blanks-separate-docs", type=truth, metavar="BOOL", help=BLANKS_HELP)
    add("--text-column", default="text", help="of records: the field with the text")
    add("--target-column", help=TARGET_HELP)
    add("--prefix", default="", help="put before the source of each pair, 'summarize: ' say")
    add("--streaming", action="store_true", help="read hf: sources over the network, uncopied")
    add("--skip-broken", action="store_true", help=SKIP_HELP)
    add("--errors", choices=["strict", "replace"], default="strict", help=ERRORS_HELP)
    add("--limit", type=int, help="documents to take, the first ones; none: all")
    add("--sample", type=float, metavar="SHARE", help="take a random share of the documents")
    add("--validation-share", type=float, help=SHARE_HELP)
    add("--seed", type=int, default=0, help="of sampled and held-out documents, and of --compat")
    add("--shard", metavar="I/N", help=SHARD_HELP)
    add("--merge", type=int, metavar="N", help="put the N parts together; builds nothing")
    add("--max-seq-length", type=int, default=128, help="row length, in tokens, to report on")
    add("--compat", choices=COMPATIBLE, help=COMPAT_HELP)
    add("--words", choices=SEGMENTERS, help=WORDS_HELP)
    add("--num-processes", type=int, default=os.cpu_count(), help="that encode")
    add("--shard-megabytes", type=int, default=64, help="of token ids in a shard")
    add("--licence", "--license", help="of the text, an SPDX identifier, for the model card")
    add("--attribution", help="whom the model card names as the text's authors")
    add("--language", help="of the text, ISO 639-1, for the model card")
    add("--overwrite", action="store_true", help="replace a dataset that is there")
    return parser


PATH_HELP = (
    "a file, or a folder read in the order of its paths: text, .jsonl, .csv, .tsv, .parquet; .gz, "
    ".xz, .zst too; a URL, of a file, a folder or a pattern, gs://BUCKET/*.txt; may be repeated"
)
SOURCE_HELP = (
    "hf:NAME[:CONFIG[:SPLIT]] of Hugging Face (a local folder too), tfds:NAME[:SPLIT] of "
    "TensorFlow Datasets, or interpreter, the prose that ships with Python; may be repeated"
)
HELD_OUT_HELP = (
    "a split of its own for this text, a path or a --source, such as books=books.txt; repeatable"
)
TARGET_HELP = "of records: the field with the target; makes pairs, whose source is --text-column"
SKIP_HELP = "leave out lines, records and files that are broken, and count them; default: stop"
SHARE_HELP = "part of the documents held out (default: 0.01, or 0 with --held-out validation=...)"
SHARD_HELP = "build part I of N, from 0, into OUTPUT_DIR.parts; --merge N makes one dataset of them"
CASE_HELP = "lower-case a vocab.txt's text, the default there"
ACCENTS_HELP = "with --vocab-file; default: as the case option"
ERRORS_HELP = "what to do about bytes that are not UTF-8: stop, or put U+FFFD"
FORMAT_HELP = (
    "sentences: one a line, blank lines between documents; lines: a document each; files: a "
    "document each (default: sentences)"
)
COMPAT_HELP = (
    "notes in the dataset that rows are to be those of google-research/electra, two segments of "
    "whole sentences, and prints what they lose; the store itself loses nothing"
)
WORDS_HELP = "find the words of Chinese by this segmenter, for whole word masks"
BLANKS_HELP = "False: blank lines are nothing, a file is a document, as --format files"


def sources_of(arguments: argparse.Namespace) -> list[Source]:
    """The sources of the command line: files, then `--source`, then those of `--held-out`."""
    blanks = arguments.blanks_separate_docs
    layout = arguments.format or ("files" if blanks is False else "sentences")
    if blanks is not None and blanks != (layout == "sentences"):
        raise UserError(f"--blanks-separate-docs {blanks} contradicts --format {layout}")
    columns = Columns(arguments.text_column, arguments.target_column, arguments.prefix)

    def files(path: Location) -> Source:
        found = text_files(path, layout, arguments.errors, columns=columns)
        return found if is_remote(path) else without_our_files(found, Path(path), arguments)

    def named(text: str) -> Source:
        if text == "interpreter":
            return InterpreterText()
        return named_source(text, columns, arguments.errors, arguments.streaming)

    sources = [files(path) for path in arguments.corpus_dir or ()]
    sources += [named(text) for text in arguments.source or ()]
    if not sources:
        raise UserError("no text: give --corpus-dir PATH, or --source NAME")
    if arguments.sample is not None:
        sources = [Sampled(source, arguments.sample, arguments.seed) for source in sources]
    for text in arguments.held_out:
        split, equals, where = text.partition("=")
        if not equals:
            raise UserError(f"--held-out {text}: expected SPLIT=TEXT, such as books=books.txt")
        is_name = where == "interpreter" or where.startswith(("hf:", "tfds:"))
        sources.append(named(where) if is_name else files(given(where)))
    if arguments.shard is not None:
        sources = [source.shard(*part_of(arguments.shard)) for source in sources]
    return sources


def settings_of(arguments: argparse.Namespace) -> BuildSettings:
    """What determines the dataset, as the command line says it."""
    held_out = tuple(text.partition("=")[0] for text in arguments.held_out)
    share = arguments.validation_share
    if share is None:
        share = 0.0 if "validation" in held_out else 0.01
    return BuildSettings(
        validation_share=share,
        seed=arguments.seed,
        limit=arguments.limit,
        shard_bytes=arguments.shard_megabytes << 20,
        compat=arguments.compat,
        words=arguments.words,
        skip_broken=arguments.skip_broken,
        held_out=held_out,
        shard=arguments.shard,
    )


def without_our_files(source: TextFiles, corpus: Path, arguments: argparse.Namespace) -> TextFiles:
    """The text without vocabulary, output and workdirs, where tutorials keep all in one folder.

    Raises:
        UserError: nothing is left.
    """
    output = arguments.output_dir.resolve()
    vocab = arguments.vocab_file or arguments.tokenizer
    beside = {Path(vocab).resolve().with_name(name) for name in TOKENIZER_FILES}
    beside |= {Path(vocab).resolve(), output.with_name("hparams.json")}

    def is_ours(path: Path) -> bool:
        path = path.resolve()
        if path in beside:
            return True
        inside = [folder for folder in path.parents if corpus.resolve() in folder.parents]
        return any(
            folder in (output, partial_folder(output)) or (folder / "checkpoints").is_dir()
            for folder in inside
        )

    ours = [path for path in source.paths if isinstance(path, Path) and is_ours(path)]
    kept = tuple(path for path in source.paths if path not in ours)
    if not kept:
        raise UserError(f"--corpus-dir {corpus} holds no text, only what the tools write")
    if ours:
        names = ", ".join(map(str, ours[:5])) + (", ..." if len(ours) > 5 else "")
        print(f"no part of the corpus: {names}", file=sys.stderr)
    return dataclasses.replace(source, paths=kept)


def total_bytes(sources: Sequence[Source], limit: int | None) -> int | None:
    """What a progress bar runs to; unknown where a limit stops the reading."""
    sizes = [source.size() for source in sources]
    return None if limit is not None or None in sizes else sum(size or 0 for size in sizes)


def main(argv: list[str]) -> None:
    """Builds the dataset and prints what it holds."""
    arguments = parser().parse_args(argv)
    # Our processes are the parallelism, not the library's threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments.merge is not None:
        show(merge(arguments.output_dir, arguments.merge, overwrite=arguments.overwrite), arguments)
        return
    if arguments.vocab_file is None and arguments.tokenizer is None:
        raise UserError("no tokenizer: give --vocab-file vocab.txt, or --tokenizer NAME")
    settings, output = settings_of(arguments), arguments.output_dir
    if arguments.shard is not None:
        output = part_folder(output, *part_of(arguments.shard))
    sources = sources_of(arguments)
    tokenizer = tokenizers.load(
        arguments.vocab_file or arguments.tokenizer,
        arguments.lowercase,
        arguments.strip_accents,
        sentinels=arguments.sentinels,
    )
    with ReadingProgress("building", total_bytes(sources, settings.limit)) as progress:
        dataset = build(
            sources,
            tokenizer,
            output,
            settings,
            Provenance(arguments.licence, arguments.attribution, arguments.language),
            num_processes=arguments.num_processes,
            overwrite=arguments.overwrite,
            notify=lambda message: print(message, file=sys.stderr),
            progress=progress.advance,
        )
        print(progress.line(progress.seconds()), file=sys.stderr)
    if arguments.shard is not None:
        print(f"part {arguments.shard} is {output}")
        for line in summary.counts(dataset) + summary.losses(dataset):
            print(line)
        return
    show(dataset, arguments)


def show(dataset: Dataset, arguments: argparse.Namespace) -> None:
    """Prints what a dataset holds, what was left out of it, and what rows of it pad."""
    print(f"dataset {arguments.output_dir}, tokenizer of {dataset.vocabulary.size:,} ids")
    lines = summary.counts(dataset) + summary.losses(dataset)
    for line in lines + summary.padding(dataset, arguments.max_seq_length):
        print(line)


if __name__ == "__main__":
    program.run(main)
