"""Sources: the same documents from any layout of files, and one clear line for bad input."""

import gzip

import pytest

from flaxpretrain.data import document, lines
from flaxpretrain.data.interpreter import InterpreterText
from flaxpretrain.data.sources import Document, TextFiles, text_files
from flaxpretrain.errors import UserError

DOCUMENTS = [("One.", "Two, with ü and 中文."), ("Three.",), ("Four.", "Five.", "Six.")]


def as_text(documents):
    return "\n\n".join("\n".join(document) for document in documents) + "\n"


def read(source):
    return [document.sentences for document in source.documents()]


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


LAYOUTS = {
    "one file": {"a.txt": as_text(DOCUMENTS)},
    "a file a document": {f"{i}.txt": as_text([d]) for i, d in enumerate(DOCUMENTS)},
    "folders": {"a/x.txt": as_text(DOCUMENTS[:1]), "b.txt": as_text(DOCUMENTS[1:])},
    "no end of line": {"a.txt": as_text(DOCUMENTS).rstrip("\n")},
    "many blank lines": {"a.txt": "\n \n" + as_text(DOCUMENTS).replace("\n\n", "\n\n \t\n\n")},
    "windows": {"a.txt": as_text(DOCUMENTS).replace("\n", "\r\n")},
    "byte order mark": {"a.txt": b"\xef\xbb\xbf" + as_text(DOCUMENTS).encode()},
    "gzip": {"a.txt.gz": gzip.compress(as_text(DOCUMENTS).encode())},
    "hidden files": {"a.txt": as_text(DOCUMENTS), ".git/b": "x", ".b": b"\xff"},
    "empty files": {"a.txt": as_text(DOCUMENTS), "b.txt": "", "c.txt": "\n\n"},
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_every_layout_gives_the_same_documents(tmp_path, layout, block, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK", block)
    assert read(text_files(write(tmp_path, LAYOUTS[layout]))) == DOCUMENTS


def test_a_line_may_be_a_document(tmp_path):
    write(tmp_path, {"a.txt": as_text(DOCUMENTS)})
    lines = [(line,) for document in DOCUMENTS for line in document]
    assert read(text_files(tmp_path, format="lines")) == lines


def test_a_file_may_be_a_document(tmp_path):
    write(tmp_path, {"a.txt": as_text(DOCUMENTS[:2]), "b.txt": as_text(DOCUMENTS[2:])})
    expected = [DOCUMENTS[0] + DOCUMENTS[1], DOCUMENTS[2]]
    assert read(text_files(tmp_path, format="files")) == expected


def test_only_line_feeds_end_lines_and_spaces_stay(tmp_path):
    line = "  a\u2028b\x0bc\x85d\t "
    write(tmp_path, {"a.txt": line + "\nnext"})
    assert read(text_files(tmp_path / "a.txt")) == [(line, "next")]


def test_a_very_long_document_is_cut_at_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "LONGEST_DOCUMENT", 10)
    write(tmp_path, {"a.txt": "12345\n67890\nabc\ndef\n"})
    assert read(text_files(tmp_path)) == [("12345", "67890"), ("abc", "def")]


def test_a_line_that_never_ends_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "LONGEST_LINE", 100)
    monkeypatch.setattr(lines, "BLOCK", 64)
    write(tmp_path, {"a.txt": "short\n" + "x" * 500})
    with pytest.raises(UserError, match="a.txt, line 2: longer than 100"):
        read(text_files(tmp_path))


def test_progress_adds_up_to_the_size(tmp_path):
    write(tmp_path, {"a.txt": as_text(DOCUMENTS), "b.gz": gzip.compress(b"text\n" * 9)})
    source = text_files(tmp_path)
    told = []
    list(source.documents(told.append))
    assert sum(told) == source.size() == sum(p.stat().st_size for p in tmp_path.iterdir())


def test_what_is_not_utf8_is_named_with_its_place(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": b"good\nline\nb\xe9d\n"})
    for block in (1 << 20, 4):
        monkeypatch.setattr(lines, "BLOCK", block)
        with pytest.raises(UserError, match=r"a.txt is not UTF-8: byte 11, line 3"):
            read(text_files(tmp_path))
    assert read(text_files(tmp_path, errors="replace")) == [("good", "line", "b\ufffdd")]


def test_a_broken_gzip_file_is_named(tmp_path):
    whole = gzip.compress(as_text(DOCUMENTS).encode() * 50)
    for content in (whole[:-20], b"no gzip at all", whole[:40] + b"\0" * 40 + whole[80:]):
        write(tmp_path, {"a.gz": content})
        with pytest.raises(UserError, match="a.gz is a broken gzip file"):
            read(text_files(tmp_path))


def test_nothing_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no file or folder .*nowhere"):
        text_files(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no files"):
        text_files(tmp_path)
    source = TextFiles("gone", (tmp_path / "gone.txt",))
    with pytest.raises(UserError, match="gone.txt cannot be read: No such file"):
        read(source)


def test_unknown_options_are_refused(tmp_path):
    with pytest.raises(UserError, match="sentences, lines, files; got 'words'"):
        TextFiles("x", (), format="words")
    with pytest.raises(UserError, match="'ignore'"):
        TextFiles("x", (), errors="ignore")


@pytest.fixture(scope="module")
def interpreter():
    return InterpreterText()


def test_the_interpreter_ships_with_a_corpus_of_english(interpreter):
    documents = list(interpreter.documents())
    sentences = [sentence for document in documents for sentence in document.sentences]
    words = [word.lower() for sentence in sentences for word in sentence.split()]
    assert 1_000_000 < interpreter.size() < 6_000_000
    assert len(documents) > 300 and len(set(words)) > 10_000
    assert 0.04 < words.count("the") / len(words) < 0.12
    assert not any(">>>" in sentence for sentence in sentences)


def test_it_is_the_same_every_time(interpreter):
    assert list(interpreter.documents()) == list(InterpreterText().documents())


def test_prose_is_told_from_code_and_tables(tmp_path):
    module = '''"""The first paragraph of this module is
joined from two lines. It ends here.

    >>> print("an example that nobody should learn from")

A table of things that follow:
+------+------+
| left | right|
+------+------+

- The first item of a list has enough words.
- The second item has enough words as well.
"""
def function(x):
    """The first paragraph of this module is joined from two lines. It ends here.

    x = [function(y) for y in range(10) if y(x) == z[3]]
    """
'''
    write(
        tmp_path, {"b.py": module, "tests/c.py": '"""Nobody reads the docstrings of the tests."""'}
    )
    write(tmp_path, {"broken.py": "def ("})
    write(
        tmp_path,
        {
            "pydoc_data/topics.py": 'topics = {"b": "Topics stand first, whatever their name.\\n"}',
        },
    )
    assert list(InterpreterText(folder=tmp_path).documents()) == [
        Document(("Topics stand first, whatever their name.",)),
        Document(
            (
                "The first paragraph of this module is joined from two lines.",
                "It ends here.",
                "The first item of a list has enough words.",
                "The second item has enough words as well.",
            )
        ),
    ]


def test_a_python_without_its_library_says_so(tmp_path):
    with pytest.raises(UserError, match="--corpus-dir"):
        list(InterpreterText(folder=tmp_path / "python.zip").documents())
