"""A cleaned corpus: the same for any number of processes, after any interruption, all counted."""

import json

import pytest

from flaxpretrain.data import corpus_cleaning, encoding
from flaxpretrain.data.cleaning import Lengths, RemoveControls, RemoveMarkup, Scrub
from flaxpretrain.data.cleaning_report import picture, table, text
from flaxpretrain.data.corpus_cleaning import CleaningSettings, clean_corpus
from flaxpretrain.data.deduplication import MinHash
from flaxpretrain.data.sources import TextFiles
from flaxpretrain.errors import UserError

WORDS = "the old river runs through a quiet town and nobody knows who built its long bridge".split()
STEPS = (RemoveControls(), RemoveMarkup(), Lengths(document=(20, None)))
SETTINGS = CleaningSettings(steps=STEPS, shard_bytes=2000)


def sentence(seed):
    return " ".join(WORDS[(seed * 7 + place * (seed % 5 + 1)) % len(WORDS)] for place in range(9))


def corpus(folder):
    """60 documents: some with markup, some short, duplicates, near duplicates, one of a test."""
    documents = [[f"{sentence(3 * n + i)} {n} {i}." for i in range(3)] for n in range(40)]
    documents += [[line.replace("river", "river ()") for line in documents[n]] for n in range(5)]
    documents += [documents[7], [line.upper() for line in documents[8]], ["\x07ok"]]
    long = [f"{sentence(n)} x{n}" for n in range(40)]
    documents += [long, [*long[:-1], "another end"], ["in front", f"{sentence(99)} {sentence(98)}"]]
    path = folder / "corpus.txt"
    content = "\n\n".join("\n".join(document) for document in documents)
    path.write_text(content + "\n", encoding="utf-8")
    held = folder / "held.txt"
    held.write_text(f"{sentence(99)} {sentence(98)}\n")
    return [TextFiles("corpus", (path,))], {"held": TextFiles("held", (held,))}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 600)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_each_step_did_is_counted(tmp_path):
    sources, tests = corpus(tmp_path)
    report = clean_corpus(sources, tmp_path / "clean", SETTINGS, tests=tests)
    steps = report["steps"]
    assert list(steps) == [
        *("controls", "markup", "length", "overlap with held", "duplicate", "near-duplicate")
    ]
    assert steps["markup"]["documents_changed"] >= 3
    assert steps["length"]["documents_dropped"] == 1
    assert steps["overlap with held"]["documents_dropped"] == 1
    # Five whose brackets are gone again, one as it was, one in capitals.
    assert steps["duplicate"]["documents_dropped"] == 7
    assert steps["near-duplicate"]["documents_dropped"] == 1
    dropped = sum(step["documents_dropped"] for step in steps.values())
    assert report["documents_read"] == report["documents"] + dropped == 51
    removed = sum(step["characters_removed"] for step in steps.values())
    assert report["characters_read"] == report["characters"] + removed
    assert report["samples"]["length"] == [{"before": "ok", "after": None}]
    assert json.loads((tmp_path / "clean" / "cleaning.json").read_text()) == report


def test_the_text_reads_as_documents_and_more_cleaning_changes_nothing(tmp_path):
    sources, _ = corpus(tmp_path)
    report = clean_corpus(sources, tmp_path / "clean", SETTINGS)
    paths = tuple(sorted((tmp_path / "clean" / "text").iterdir()))
    assert len(paths) > 2
    cleaned = TextFiles("clean", paths)
    assert len(list(cleaned.documents())) == report["documents"]
    again = clean_corpus([cleaned], tmp_path / "again", SETTINGS)
    assert again["documents"] == again["documents_read"]
    assert not any(sum(step.values()) for step in again["steps"].values())


def test_any_number_of_processes_gives_the_same_files(tmp_path):
    sources, tests = corpus(tmp_path)
    for count in (1, 2):
        folder = tmp_path / f"by{count}"
        clean_corpus(sources, folder, SETTINGS, tests=tests, num_processes=count)
    assert files(tmp_path / "by1") == files(tmp_path / "by2")


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    sources, tests = corpus(tmp_path)
    clean_corpus(sources, tmp_path / "whole", SETTINGS, tests=tests)
    take, count = corpus_cleaning._Run._take, 0

    def stop(self, cleaned):
        nonlocal count
        count += 1
        if count == 9:
            raise KeyboardInterrupt
        take(self, cleaned)

    monkeypatch.setattr(corpus_cleaning._Run, "_take", stop)
    with pytest.raises(KeyboardInterrupt):
        clean_corpus(sources, tmp_path / "cut", SETTINGS, tests=tests)
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(corpus_cleaning._Run, "_take", take)
    said = []
    clean_corpus(sources, tmp_path / "cut", SETTINGS, tests=tests, notify=said.append)
    assert "going on with an interrupted run" in said[0]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert not (tmp_path / "cut.partial").exists()


@pytest.mark.parametrize("change", ["another word", "shorter", "other borders"])
def test_changed_text_and_settings_are_noticed(tmp_path, change):
    sources, _ = corpus(tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(corpus_cleaning._Run, "_finish", lambda self: 1 / 0)
        clean_corpus(sources, tmp_path / "cut", SETTINGS)
    path = sources[0].paths[0]
    content = path.read_text("utf-8")
    changed = {
        "another word": content.replace("quiet", "noisy"),
        "shorter": content[: len(content) // 2],
        "other borders": "one more in front\n\n" + content,
    }
    path.write_text(changed[change], "utf-8")
    with pytest.raises(UserError, match="not that of the interrupted run"):
        clean_corpus(sources, tmp_path / "cut", SETTINGS)
    said = []
    other = CleaningSettings(steps=STEPS[:1], shard_bytes=2000)
    clean_corpus(sources, tmp_path / "cut", other, notify=said.append)
    assert said[:1] == ["starting anew: the interrupted run had other settings or sources"]


def test_what_is_there_is_not_replaced_unasked(tmp_path):
    sources, _ = corpus(tmp_path)
    clean_corpus(sources, tmp_path / "clean", SETTINGS)
    with pytest.raises(UserError, match="pass --overwrite"):
        clean_corpus(sources, tmp_path / "clean", SETTINGS)
    clean_corpus(sources, tmp_path / "clean", SETTINGS, overwrite=True)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine is there"):
        clean_corpus(sources, tmp_path / "mine", SETTINGS, overwrite=True)
    nothing = CleaningSettings(steps=(Lengths(document=(10**6, None)),))
    with pytest.raises(UserError, match="nothing is left of the corpus"):
        clean_corpus(sources, tmp_path / "none", nothing)


def test_the_report_as_text_and_picture(tmp_path):
    sources, tests = corpus(tmp_path)
    settings = CleaningSettings(steps=(*STEPS, Scrub()), near=MinHash(threshold=0.9))
    report = clean_corpus(sources, tmp_path / "clean", settings, tests=tests)
    lines = table(report)
    assert lines[0].startswith("read: 51 documents") and lines[-1].startswith("left: ")
    assert any(line.startswith("scrub ") for line in lines)
    assert "  dropped: ok" in text(report) and "  after:   " in text(report)
    picture(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
