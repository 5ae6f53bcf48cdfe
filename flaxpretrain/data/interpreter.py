"""Real English that ships with every Python: the language reference and the library's docstrings.

A corpus for a first run that downloads nothing. Files are parsed, never imported.
"""

import ast
import dataclasses
import functools
import inspect
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from flaxpretrain.data.sources import Document, Losses, Source
from flaxpretrain.errors import UserError

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}
)
TOPICS = Path("pydoc_data", "topics.py")
FEWEST_WORDS = 6
"""Paragraphs with fewer words are headings, signatures and the like."""

_WORD = re.compile(r"[(\"'`*]*[A-Za-z][a-z]*(?:['’-][A-Za-z]+)*[)\"'`*]*[.,;:!?)]*")
_NOT_PROSE = re.compile(r">>>|^\.\. |\S {3,}\S|[|+]\s*[|+]|[-=*~^_]{4,}|\+--", re.MULTILINE)
_BULLET = re.compile(r"^(?:[-*+•]|\d+[.)]|\(\d+\))\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


@dataclasses.dataclass(frozen=True)
class InterpreterText(Source):
    """The prose that this interpreter ships with: a document for each topic and each module.

    The text depends on the version of Python, and on nothing else: 1.6 MB in 600 documents with
    CPython 3.11.7. Repeated paragraphs, code,
    doctests and tables are left out; lines are joined to paragraphs and cut into sentences.
    """

    name: str = "interpreter"
    folder: Path | None = None
    """The standard library's; None means this interpreter's."""

    @property
    def library(self) -> Path:
        """The folder that is read.

        Raises:
          UserError: it is not there, as in a Python that keeps its library in an archive.
        """
        folder = self.folder or Path(sysconfig.get_paths()["stdlib"])
        if not folder.is_dir():
            raise UserError(
                f"this Python keeps no readable standard library ({folder}); "
                "give a corpus of your own with --corpus-dir"
            )
        return folder

    def size(self) -> int:
        """UTF-8 bytes of the text."""
        return sum(map(_bytes, self._documents))

    def documents(
        self, progress: Callable[[int], None] | None = None, losses: Losses | None = None
    ) -> Iterator[Document]:
        """Topics first, in the order of their names, then modules, in the order of their paths."""
        for document in self._documents:
            if progress is not None:
                progress(_bytes(document))
            yield document

    @functools.cached_property
    def _documents(self) -> tuple[Document, ...]:
        # Kept: parsing a thousand files takes seconds, and a first run reads the text three times.
        seen: set[str] = set()
        documents = (
            Document(tuple(_prose(texts, seen)))
            for path in self._files()
            for texts in _texts(path, path.read_bytes())
        )
        return tuple(document for document in documents if document.sentences)

    def _files(self) -> list[Path]:
        folder = self.library
        modules = [
            path
            for path in folder.rglob("*.py")
            if not SKIPPED_FOLDERS & set(path.relative_to(folder).parts) and path != folder / TOPICS
        ]
        topics = [folder / TOPICS] if (folder / TOPICS).is_file() else []
        return topics + sorted(modules, key=lambda path: path.relative_to(folder).parts)


def _bytes(document: Document) -> int:
    return sum(len(sentence.encode()) + 1 for sentence in document.sentences)


def _texts(path: Path, source: bytes) -> Iterator[list[str]]:
    """The texts of a file, a list for each document."""
    try:
        with warnings.catch_warnings():
            # Doubtful escapes in somebody else's strings.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        # lib2to3 and others keep broken files as samples; they hold no prose.
        return
    if path.parts[-2:] == TOPICS.parts:
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                topics = ast.literal_eval(node.value)
                yield from ([topics[name]] for name in sorted(topics))
        return
    yield list(_docstrings(tree))


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module, class or function and of all in it, in the order of the text."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield text
    # Statements only: expressions, most of a tree, hold no definitions.
    for part in ("body", "handlers", "orelse", "finalbody"):
        statements = getattr(node, part, ())
        if isinstance(statements, list):
            for statement in statements:
                yield from _docstrings(statement)


def _prose(texts: list[str], seen: set[str]) -> Iterator[str]:
    """Sentences of the paragraphs that are prose and were not `seen` before."""
    for text in texts:
        for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
            for paragraph in _paragraphs(block):
                if paragraph not in seen and _is_prose(paragraph):
                    seen.add(paragraph)
                    yield from _SENTENCE_END.split(paragraph)


def _paragraphs(block: str) -> Iterator[str]:
    """The items of a list, or the one paragraph, of lines that no blank line separates."""
    if _NOT_PROSE.search(block):
        return
    lines: list[str] = []
    for line in map(str.strip, block.split("\n")):
        if _BULLET.match(line) and lines:
            yield " ".join(lines)
            lines = []
        lines.append(_BULLET.sub("", line))
    yield " ".join(lines)


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    plain = sum(_WORD.fullmatch(word) is not None for word in words)
    return len(words) >= FEWEST_WORDS and plain >= 0.75 * len(words)
