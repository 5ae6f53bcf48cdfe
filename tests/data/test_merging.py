"""Splits of their own, broken text left out, and datasets built in parts and put together."""

import json

import numpy as np
import pytest

from flaxpretrain.data import encoding, summary
from flaxpretrain.data.building import BuildSettings, build
from flaxpretrain.data.merging import merge, part_folder, part_of
from flaxpretrain.data.sources import text_files
from flaxpretrain.data.store import open_dataset
from flaxpretrain.data.tokenizer_training import train_wordpiece
from flaxpretrain.errors import UserError
from tests.data.test_building import DOCUMENTS, hashes, write


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 200)


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece((s for d in DOCUMENTS for s in d), 120)


def documents_of(dataset, split):
    split = dataset.split(split)
    stream, _ = split.gather(np.array([0]), np.array([split.tokens]), split.tokens)
    return sorted(tuple(ids) for ids in np.split(stream[0], split.document_offsets[1:-1]))


def build_parts(source, tokenizer, output, count, **settings):
    for index in range(count):
        chosen = BuildSettings(0.2, shard_bytes=400, shard=f"{index}/{count}", **settings)
        build([source.shard(index, count)], tokenizer, part_folder(output, index, count), chosen)


@pytest.mark.parametrize("per_file", [3, 60])
def test_parts_together_hold_what_one_build_holds(tokenizer, tmp_path, per_file):
    source = write(tmp_path / "corpus", DOCUMENTS, per_file)
    whole = build([source], tokenizer, tmp_path / "whole", BuildSettings(0.2, shard_bytes=400))
    build_parts(source, tokenizer, tmp_path / "data", 4)
    merged = merge(tmp_path / "data", 4)
    merged.verify()
    for split in ("train", "validation"):
        assert documents_of(merged, split) == documents_of(whole, split)
        for count in ("tokens", "sentences", "bytes"):
            assert getattr(merged.split(split), count) == getattr(whole.split(split), count)
    (there,), (wanted,) = merged.metadata["sources"], whole.metadata["sources"]
    assert [there[n] for n in ("name", "documents", "bytes")] == [
        wanted[n] for n in ("name", "documents", "bytes")
    ]
    assert merged.metadata["build"]["parts"] == 4
    before = hashes(merged.folder)
    with pytest.raises(UserError, match="is there already: pass --overwrite"):
        merge(tmp_path / "data", 4)
    assert hashes(merge(tmp_path / "data", 4, overwrite=True).folder) == before


def test_a_part_may_have_no_text(tokenizer, tmp_path):
    source = write(tmp_path / "corpus", DOCUMENTS[:2], 60)
    build_parts(source, tokenizer, tmp_path / "data", 5)
    merged = merge(tmp_path / "data", 5)
    assert sum(split.documents for split in merged.splits.values()) == 2


def test_parts_that_do_not_belong_together_are_refused(tokenizer, tmp_path):
    source = write(tmp_path / "corpus", DOCUMENTS, 60)
    build_parts(source, tokenizer, tmp_path / "data", 2)
    with pytest.raises(UserError, match="00000-of-00003 is no finished part: .* --shard 0/3"):
        merge(tmp_path / "data", 3)
    settings = BuildSettings(0.3, shard="1/2")
    folder = part_folder(tmp_path / "data", 1, 2)
    build([source.shard(1, 2)], tokenizer, folder, settings, overwrite=True)
    with pytest.raises(UserError, match="00001-of-00002 was built differently .*validation_share"):
        merge(tmp_path / "data", 2)
    (tmp_path / "letters").mkdir()
    with pytest.raises(UserError, match="is no dataset"):
        merge(tmp_path / "letters", 2)
    for wrong in ("3/3", "1", "a/b", "-1/2"):
        with pytest.raises(UserError, match="--shard"):
            part_of(wrong)
    assert part_of("2/3") == (2, 3)


def test_a_source_may_be_a_split_of_its_own(tokenizer, tmp_path):
    source = write(tmp_path / "corpus", DOCUMENTS, 60)
    others = [write(tmp_path / name, DOCUMENTS[first::9], 60) for first, name in enumerate("ab")]
    settings = BuildSettings(0.0, limit=20, held_out=("validation", "books"))
    dataset = build([source, *others], tokenizer, tmp_path / "data", settings)
    assert {name: split.documents for name, split in dataset.splits.items()} == {
        "train": 20, "validation": len(DOCUMENTS[0::9]), "books": len(DOCUMENTS[1::9]),
    }  # fmt: skip
    messages = []
    build([source, *others], tokenizer, dataset.folder, settings, notify=messages.append)
    assert "is built already" in messages[0]
    parallel = build([source, *others], tokenizer, tmp_path / "again", settings, num_processes=2)
    assert hashes(parallel.folder) == hashes(dataset.folder)
    for name in ("train", "a/b", ""):
        with pytest.raises(UserError, match="--held-out"):
            BuildSettings(held_out=(name,))
    (tmp_path / "nothing.txt").write_text("\n")
    with pytest.raises(UserError, match="--held-out books: its source holds no document"):
        nothing = text_files(tmp_path / "nothing.txt")
        build([source, nothing], tokenizer, tmp_path / "none", BuildSettings(held_out=("books",)))


def test_what_is_left_out_is_counted_in_the_dataset(tokenizer, tmp_path):
    lines = [json.dumps({"text": "\n".join(document)}) for document in DOCUMENTS]
    lines[3:3] = ["{broken", '{"text": ""}', '{"text": "\\u200b"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = text_files(tmp_path / "a.jsonl", name="tales")
    with pytest.raises(UserError, match="a.jsonl, line 4: no JSON"):
        build([source], tokenizer, tmp_path / "data")
    told = []
    settings = BuildSettings(skip_broken=True)
    dataset = build([source], tokenizer, tmp_path / "data", settings, notify=told.append)
    assert len(told) == 1 and told[0].startswith("left out: ") and "line 4: no JSON" in told[0]
    assert dataset.metadata["sources"][0]["lost"] == {"broken": 1, "empty": 1}
    assert summary.losses(dataset) == [
        "tales: 1 left out as broken; 1 records without text",
        "1 of 61 documents hold no token",
    ]
    assert "is built already" in _message(source, tokenizer, dataset.folder, settings)
    assert open_dataset(dataset.folder).split("train").documents > 50


def _message(source, tokenizer, folder, settings):
    told = []
    build([source], tokenizer, folder, settings, notify=told.append)
    return told[-1]
