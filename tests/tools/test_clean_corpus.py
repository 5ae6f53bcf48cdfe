"""tools/clean_corpus.py: from a folder of text to text and a report."""

import pytest

from flaxpretrain.errors import UserError

DOCUMENTS = [
    "The river (;) runs through the town.\nIt is &amp; was long.",
    "A second text, about a bridge that is old.\nMail me: ann@example.org please.",
    "一二三四五六七八九十百千",
    "A second text, about a bridge that is old.\nMail me: ann@example.org please.",
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text" / "a.txt"
    path.parent.mkdir()
    path.write_text("\n\n".join(DOCUMENTS) + "\n", encoding="utf-8")
    return path.parent


def clean(tool, corpus, output, *flags):
    arguments = ["--corpus-dir", str(corpus), "--output-dir", str(output), "--num-processes", "1"]
    tool("clean_corpus").main([*arguments, *flags])
    return (output / "text" / "clean-00000.txt").read_text(encoding="utf-8")


def test_defaults(tool, corpus, tmp_path, capsys):
    text = clean(tool, corpus, tmp_path / "clean")
    assert text.startswith("The river runs through the town.\nIt is & was long.\n\nA second text")
    assert "ann@example.org" in text and text.count("bridge") == 1
    printed = capsys.readouterr().out
    assert "read: 4 documents" in printed and "left: 3 documents" in printed
    assert "The river (;) runs" in (tmp_path / "clean" / "report.txt").read_text("utf-8")
    assert (tmp_path / "clean" / "report.png").stat().st_size > 1000


def test_steps_are_switched_on_and_off(tool, corpus, tmp_path):
    flags = ["--without", "markup", "--without", "duplicate", "--without", "near-duplicate"]
    text = clean(tool, corpus, tmp_path / "a", *flags, "--keep-language", "en", "--scrub")
    assert "(;)" in text and "一" not in text
    assert text.count("bridge") == 2 and "(e-mail address)" in text
    text = clean(tool, corpus, tmp_path / "b", "--min-sentence", "36", "--max-symbols", "0.2")
    assert "It is" not in text and "The river" in text or "A second" in text


def test_test_sets(tool, corpus, tmp_path):
    held = tmp_path / "held.txt"
    held.write_text("a bridge that is old. Mail me\n", encoding="utf-8")
    text = clean(tool, corpus, tmp_path / "a", "--test-set", f"held={held}", "--overlap-words", "5")
    assert "bridge" not in text and "river" in text


def test_what_is_broken_stops_the_cleaning_or_is_left_out_and_counted(
    tool, corpus, tmp_path, capsys
):
    (corpus / "b.jsonl").write_text('{"text": "A third one."}\n{"text": "cut\n{"text": " "}\n')
    with pytest.raises(UserError, match="b.jsonl, line 2: no JSON"):
        clean(tool, corpus, tmp_path / "clean")
    assert not (tmp_path / "clean").exists()
    assert "A third one." in clean(tool, corpus, tmp_path / "clean", "--skip-broken")
    said = capsys.readouterr()
    assert "text: 1 left out as broken; 1 records without text" in said.out
    assert "left out: " in said.err and "b.jsonl, line 2" in said.err
    assert "left out as broken" in (tmp_path / "clean" / "report.txt").read_text("utf-8")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--test-set", "nothing"], "--test-set takes NAME=TEXT"),
        (["--keep-language", "en", "--script-share", "2"], "a share above 0"),
        (["--resemblance", "0"], "resemblance lies above 0"),
        (["--num-processes", "0"], "--num-processes is 1 or more"),
    ],
)
def test_mistakes(tool, corpus, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        clean(tool, corpus, tmp_path / "clean", *flags)
    with pytest.raises(UserError, match="no text: give --corpus-dir"):
        tool("clean_corpus").main(["--output-dir", str(tmp_path / "x")])
