"""Data sets of libraries: Hugging Face's, saved, streamed or as files; TensorFlow's without it."""

import json
import subprocess
import sys

import pytest

from flaxpretrain.data.library_sources import HuggingFace, named_source, parts_of
from flaxpretrain.data.records import Columns
from flaxpretrain.data.sources import Strided, TextFiles
from flaxpretrain.errors import UserError

datasets = pytest.importorskip("datasets")
TEXTS = [f"Text {number}.\nIts second line, ü." for number in range(600)]
DOCUMENTS = [tuple(text.split("\n")) for text in TEXTS]


def read(source):
    return [found.sentences for found in source.documents()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A dictionary of splits that `save_to_disk` wrote."""
    folder = tmp_path_factory.mktemp("hub") / "tales"
    splits = {"train": TEXTS[:500], "test": TEXTS[500:]}
    table = {
        name: datasets.Dataset.from_dict({"text": texts, "id": list(range(len(texts)))})
        for name, texts in splits.items()
    }
    datasets.DatasetDict(table).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    """A folder as the hub has them: JSON lines and Parquet, the split in the name."""
    folder = tmp_path_factory.mktemp("hub") / "tales"
    (folder / "data").mkdir(parents=True)
    rows = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "data" / "train-00000-of-00002.jsonl").write_text("".join(rows[:250]))
    (folder / "data" / "train-00001-of-00002.jsonl").write_text("".join(rows[250:500]))
    (folder / "data" / "test-00000-of-00001.jsonl").write_text("".join(rows[500:]))
    (folder / "README.md").write_text("A card, no text of the corpus.")
    return folder


def test_names_are_cut_at_colons_outside_brackets():
    assert parts_of("a/b:c:train[:10%]+test[5:]") == ["a/b", "c", "train[:10%]+test[5:]"]
    source = named_source("hf:org/name:en", Columns("body"), streaming=True)
    assert isinstance(source, HuggingFace) and source.streaming
    assert (source.dataset, source.config, source.split) == ("org/name", "en", "train")
    assert source.name == "hf:org/name:en:train"
    for wrong in ("hf:", "hf:a:b:c:d", "web:a", "a"):
        with pytest.raises(UserError, match="expected hf:NAME"):
            named_source(wrong)


def test_a_saved_set_is_read_by_split(saved):
    source = named_source(f"hf:{saved}::train")
    assert read(source) == DOCUMENTS[:500] and source.name == "tales:train"
    assert read(named_source(f"hf:{saved}::test+train")) == DOCUMENTS[500:] + DOCUMENTS[:500]
    with pytest.raises(UserError, match="has no split 'dev'; it has train, test"):
        read(named_source(f"hf:{saved}::dev"))
    with pytest.raises(UserError, match="no column 'body', it has text, id: .*--text-column"):
        read(named_source(f"hf:{saved}", Columns("body")))
    assert read(named_source(f"hf:{saved / 'test'}")) == DOCUMENTS[500:]


def test_shards_of_a_saved_set_are_consecutive(saved):
    source = named_source(f"hf:{saved}")
    parts = [read(source.shard(index, 3)) for index in range(3)]
    assert sum(parts, []) == DOCUMENTS[:500] and min(map(len, parts)) > 160


def test_a_folder_of_files_is_read_by_split_without_a_copy(laid_out):
    source = named_source(f"hf:{laid_out}")
    assert isinstance(source, TextFiles) and read(source) == DOCUMENTS[:500]
    assert read(named_source(f"hf:{laid_out}:data:test")) == DOCUMENTS[500:]
    with pytest.raises(UserError, match="no file of split 'validation'; there are files of test"):
        named_source(f"hf:{laid_out}::validation")


def test_a_set_is_streamed(laid_out):
    source = named_source(f"hf:{laid_out}::test", streaming=True)
    assert read(source) == DOCUMENTS[500:] and source.size() is None
    assert type(source.shard(1, 2)) is Strided
    assert sorted(read(source.shard(0, 2)) + read(source.shard(1, 2))) == sorted(DOCUMENTS[500:])


def test_the_library_prepares_a_set(laid_out, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = HuggingFace("x", str(laid_out), split="train[:3]+test")
    assert read(source) == DOCUMENTS[:3] + DOCUMENTS[500:]


def test_a_set_that_is_not_there_is_one_line():
    for streaming in (False, True):
        with pytest.raises(UserError, match="hf:nobody/nothing: ") as error:
            read(named_source("hf:nobody/nothing", streaming=streaming))
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A set of TensorFlow Datasets, prepared without TensorFlow."""
    pytest.importorskip("array_record")
    folder = tmp_path_factory.mktemp("tfds")
    script = folder / "prepare.py"
    script.write_text(PREPARE)
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    if "No module named" in done.stderr:
        pytest.skip(done.stderr.strip().split("\n")[-1])
    assert done.returncode == 0, done.stderr
    return folder


PREPARE = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Tales(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        features = {"text": tfds.features.Text(), "id": np.int32}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))
    def _split_generators(self, manager):
        return {"train": self._generate_examples(500), "test": self._generate_examples(30)}
    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"Text {i}.\\nIts second line, \\u00fc.", "id": i}

Tales(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


def test_a_prepared_tensorflow_set_is_read_without_tensorflow(prepared):
    folder = prepared / "tales" / "1.0.0"
    source = named_source(f"tfds:{folder}")
    found = read(source)
    assert sorted(found) == sorted(DOCUMENTS[:500]) and source.name == "1.0.0:train"
    assert "tensorflow" not in sys.modules
    assert sum((read(source.shard(index, 7)) for index in range(7)), []) == found
    both = named_source(f"tfds:{folder}:train+test")
    assert read(both) == found + read(named_source(f"tfds:{folder}:test"))
    assert sum((read(both.shard(index, 4)) for index in range(4)), []) == read(both)
    assert len(read(named_source(f"tfds:{folder}:train[:10]"))) == 10
    # As TFDS_DATA_DIR does, which the library reads when it is imported.
    import tensorflow_datasets

    tensorflow_datasets.core.add_data_dir(prepared)
    assert len(read(named_source("tfds:tales:1.0.0:test"))) == 30


def test_mistakes_about_a_tensorflow_set_are_one_line(prepared):
    folder = prepared / "tales" / "1.0.0"
    for text, message in {
        f"tfds:{folder}:dev": "dev",
        f"tfds:{prepared}": "tfds:",
        "tfds:no_such_set": "tfds:no_such_set: ",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            read(named_source(text))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no column 'body', it has"):
        read(named_source(f"tfds:{folder}", Columns("body")))
