"""Cleans a corpus before it is built: text in, text out, and a report of what went and why.

    python tools/clean_corpus.py --corpus-dir TEXT --output-dir CLEAN --keep-language en \\
        --min-document 200 --test-set validation=valid.txt --test-set squad=squad.jsonl
    python tools/build_pretraining_dataset.py --corpus-dir CLEAN/text --vocab-file vocab.txt \\
        --output-dir DATA --held-out validation=valid.txt

By default it normalises Unicode, takes out control characters, leftovers of markup and empty
brackets, and drops duplicates and near duplicates; --without leaves one of these out. All else
happens only when its option is given. CLEAN/report.txt and report.png say what each step did, with
examples. The text is the same for any --num-processes; the same command goes on where it stopped.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flaxpretrain import program
from flaxpretrain.data import cleaning_report
from flaxpretrain.data.cleaning import (
    LANGUAGE_SCRIPTS,
    KeepScripts,
    Lengths,
    NormalizeUnicode,
    RemoveControls,
    RemoveMarkup,
    Scrub,
    Step,
    Symbols,
)
from flaxpretrain.data.corpus_cleaning import TEXT_FOLDER, CleaningSettings, clean_corpus
from flaxpretrain.data.deduplication import MinHash
from flaxpretrain.data.interpreter import InterpreterText
from flaxpretrain.data.library_sources import named_source
from flaxpretrain.data.progress import ReadingProgress
from flaxpretrain.data.records import Columns
from flaxpretrain.data.sources import FORMATS, Source, text_files
from flaxpretrain.errors import UserError
from flaxpretrain.locations import given

DEFAULTS = ("unicode", "controls", "markup", "duplicate", "near-duplicate")


def parser() -> program.Parser:
    """The arguments."""
    parser = program.Parser(__doc__)
    add = parser.add_argument
    add("--corpus-dir", type=given, action="append", metavar="PATH", default=[],
        help="a file or a folder: text, .jsonl, .parquet, packed or not; repeatable")  # fmt: skip
    add("--source", action="append", metavar="NAME", default=[],
        help="hf:NAME[:CONFIG[:SPLIT]], tfds:NAME[:SPLIT] or interpreter; repeatable")  # fmt: skip
    add(
        "--output-dir",
        type=program.output_folder,
        required=True,
        help="folder to make; the text is in text/",
    )
    add("--format", choices=FORMATS, default="sentences",
        help="sentences: blank lines between documents; lines, files: a document each")  # fmt: skip
    add("--text-column", default="text", help="of records: the field with the text")
    add("--errors", choices=["strict", "replace"], default="strict", help="about bad UTF-8")
    add("--skip-broken", action="store_true",
        help="leave out and count what cannot be read, instead of stopping")  # fmt: skip
    add("--limit", type=int, help="documents to read, the first ones; none: all")
    add("--without", choices=DEFAULTS, action="append", default=[],
        help="leave this step out; repeatable")  # fmt: skip
    add("--unicode", choices=["NFC", "NFKC"], default="NFC", help="normal form")
    script = parser.add_mutually_exclusive_group()
    script.add_argument("--keep-language", choices=sorted(LANGUAGE_SCRIPTS),
        help="drop documents in other scripts than this language's")  # fmt: skip
    script.add_argument("--keep-scripts", nargs="+", metavar="SCRIPT",
        help="the same by Unicode's names: LATIN, CYRILLIC, CJK, HANGUL, ...")  # fmt: skip
    add("--script-share", type=float, default=0.5, help="of the letters that must be in them")
    add("--min-document", type=int, default=0, metavar="N", help="characters of a document")
    add("--max-document", type=int, metavar="N", help="characters of a document")
    add("--min-sentence", type=int, default=0, metavar="N", help="characters of a line")
    add("--max-sentence", type=int, metavar="N", help="characters of a line")
    add("--max-symbols", type=float, metavar="SHARE",
        help="drop lines with more characters that are no letters, digits or spaces")  # fmt: skip
    add("--max-digits", type=float, metavar="SHARE", help="drop lines with more digits")
    add("--scrub", action="store_true",
        help="placeholders for e-mail addresses, phone numbers, keys and passwords")  # fmt: skip
    add("--resemblance", type=float, default=0.8,
        help="share of runs of five words that makes a near duplicate")  # fmt: skip
    add("--test-set", action="append", default=[], metavar="NAME=TEXT",
        help="drop documents that share a run of words with it; a path or a --source")  # fmt: skip
    add("--overlap-words", type=int, default=13, help="words in such a run")
    add("--num-processes", type=int, default=os.cpu_count(), help="that clean")
    add("--shard-megabytes", type=int, default=64, help="of text in a file")
    add("--overwrite", action="store_true", help="replace a cleaned corpus that is there")
    return parser


def steps_of(arguments: argparse.Namespace) -> tuple[Step, ...]:
    """The steps that the command line asks for, in their order."""
    steps: list[Step] = [NormalizeUnicode(arguments.unicode), RemoveControls(), RemoveMarkup()]
    steps = [step for step in steps if step.name not in arguments.without]
    if arguments.scrub:
        steps.append(Scrub())
    if arguments.max_symbols is not None or arguments.max_digits is not None:
        symbols, digits = arguments.max_symbols, arguments.max_digits
        steps.append(
            Symbols(1.0 if symbols is None else symbols, 1.0 if digits is None else digits)
        )
    document = (arguments.min_document, arguments.max_document)
    sentence = (arguments.min_sentence, arguments.max_sentence)
    if (document, sentence) != ((0, None), (0, None)):
        steps.append(Lengths(document, sentence))
    scripts = arguments.keep_scripts or LANGUAGE_SCRIPTS.get(arguments.keep_language)
    if scripts:
        names = tuple(name.upper() for name in scripts)
        steps.append(KeepScripts(names, arguments.script_share))
    return tuple(steps)


def source_of(text: str, arguments: argparse.Namespace) -> Source:
    """The source of a path, or of a name as --source takes it."""
    columns = Columns(arguments.text_column, None, "")
    if text == "interpreter":
        return InterpreterText()
    if text.startswith(("hf:", "tfds:")):
        return named_source(text, columns, arguments.errors, False)
    return text_files(given(text), arguments.format, arguments.errors, columns=columns)


def main(argv: list[str]) -> None:
    """Cleans the corpus and prints what each step did."""
    arguments = parser().parse_args(argv)
    names = [*map(str, arguments.corpus_dir), *arguments.source]
    if not names:
        raise UserError("no text: give --corpus-dir PATH or --source NAME")
    sources = [source_of(name, arguments) for name in names]
    tests = {}
    for entry in arguments.test_set:
        name, equals, text = entry.partition("=")
        if not (name and equals and text):
            raise UserError(f"--test-set takes NAME=TEXT, such as squad=squad.txt; got {entry!r}")
        tests[name] = source_of(text, arguments)
    near = "near-duplicate" not in arguments.without
    settings = CleaningSettings(
        steps=steps_of(arguments),
        duplicates="duplicate" not in arguments.without,
        near=MinHash(threshold=arguments.resemblance) if near else None,
        overlap_words=arguments.overlap_words,
        limit=arguments.limit,
        skip_broken=arguments.skip_broken,
        shard_bytes=arguments.shard_megabytes << 20,
    )
    sizes = [source.size() for source in sources]
    total = None if arguments.limit or None in sizes else sum(size or 0 for size in sizes)
    with ReadingProgress("cleaning", total) as progress:
        report = clean_corpus(
            sources,
            arguments.output_dir,
            settings,
            tests=tests,
            num_processes=arguments.num_processes,
            overwrite=arguments.overwrite,
            notify=lambda message: print(message, file=sys.stderr),
            progress=progress.advance,
        )
    for line in cleaning_report.table(report):
        print(line)
    text = cleaning_report.text(report)
    (arguments.output_dir / "report.txt").write_text(text, encoding="utf-8")
    cleaning_report.picture(report, arguments.output_dir / "report.png")
    memory = report["memory_of_duplicates_bytes"] / 1e6
    print(f"{memory:,.1f} MB held to find duplicates")
    print(f"text in {arguments.output_dir / TEXT_FOLDER}; examples in report.txt and report.png")


if __name__ == "__main__":
    program.run(main)
