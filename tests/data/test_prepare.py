"""A recipe's dataset: built once from text, whoever asks and however many ask at once."""

import dataclasses
import fcntl
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flaxpretrain.config import Data, dataset_folder, load_recipe, override, parse, render
from flaxpretrain.data import prepare as preparing
from flaxpretrain.data.interpreter import InterpreterText
from flaxpretrain.data.prepare import Existing, PrepareDataset, WordPiece
from flaxpretrain.data.rows import Blocks
from flaxpretrain.data.sources import TextFiles
from flaxpretrain.data.store import METADATA_FILE, open_dataset
from flaxpretrain.errors import UserError
from tests import toys

TEXT = "\n\n".join(f"the cat sees the {word}.\nit likes milk." for word in "abcdefghij" * 4)


@pytest.fixture
def prepare(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return PrepareDataset(
        source=TextFiles("tales", (file,)),
        tokenizer=WordPiece(vocab_size=80),
        validation_share=0.3,
        licence="cc0-1.0",
        language="en",
    )


def test_a_workdir_gets_a_dataset_with_its_tokenizer(prepare, tmp_path, capsys):
    prepare.run(toys.run(), tmp_path / "workdir")
    dataset = open_dataset(tmp_path / "workdir" / "dataset")
    assert set(dataset.splits) == {"train", "validation"}
    assert (dataset.tokenizer_folder / "tokenizer.json").is_file()
    assert dataset.metadata["licence"] == "cc0-1.0" and dataset.metadata["language"] == "en"
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["read", "trained", "built"]
    assert all(line.endswith(" s)") for line in lines)


def test_what_is_there_stays(prepare, tmp_path, capsys):
    prepare.run(toys.run(), tmp_path)
    written = (tmp_path / "dataset" / METADATA_FILE).stat().st_mtime_ns
    capsys.readouterr()
    dataclasses.replace(prepare, validation_share=0.5).run(toys.run(), tmp_path)
    assert (tmp_path / "dataset" / METADATA_FILE).stat().st_mtime_ns == written
    assert capsys.readouterr().err == ""


def test_a_folder_that_the_user_named_is_left_alone(prepare, tmp_path):
    run = toys.run(data=Data(layout=Blocks(), folder=str(tmp_path / "mine")))
    prepare.run(run, tmp_path / "workdir")
    assert not dataset_folder(run, tmp_path / "workdir").exists()


def test_an_existing_tokenizer_may_serve(prepare, tmp_path):
    prepare.run(toys.run(), tmp_path / "first")
    tokenizer = Existing(name=str(tmp_path / "first" / "dataset" / "tokenizer"))
    dataclasses.replace(prepare, tokenizer=tokenizer).run(toys.run(), tmp_path / "second")
    one, other = (open_dataset(tmp_path / name / "dataset") for name in ("first", "second"))
    assert one.metadata == other.metadata


def test_others_wait_for_the_one_that_builds(prepare, tmp_path, monkeypatch):
    built = []
    real = preparing.build

    def slow(*arguments, **options):
        built.append(threading.get_ident())
        return real(*arguments, **options)

    monkeypatch.setattr(preparing, "build", slow)
    monkeypatch.setattr(preparing, "POLL_SECONDS", 0.01)
    threads = [threading.Thread(target=prepare.run, args=(toys.run(), tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert open_dataset(tmp_path / "dataset").split("train").tokens > 0


def test_a_builder_that_takes_too_long_is_told(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "POLL_SECONDS", 0.01)
    with (tmp_path / ".dataset.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process has been building .* for 0.05 sec"):
            dataclasses.replace(prepare, wait_seconds=0.05).run(toys.run(), tmp_path)
    prepare.run(toys.run(), tmp_path)  # the lock died with its file


def test_a_text_that_is_missing_is_refused_and_leaves_nothing_that_looks_whole(prepare, tmp_path):
    gone = dataclasses.replace(prepare, source=TextFiles("gone", (tmp_path / "no.txt",)))
    with pytest.raises(UserError, match="no.txt"):
        gone.run(toys.run(), tmp_path)
    assert not (tmp_path / "dataset").exists()


def test_the_value_is_part_of_the_runs_record(prepare):
    value = PrepareDataset(source=InterpreterText(), tokenizer=WordPiece(vocab_size=100))
    assert parse(json.loads(json.dumps(render(value)))) == value
    assert render(prepare)["source"]["name"] == "tales"
    run = override(toys.run(prepare=(value,)), "prepare.0.tokenizer.vocab_size", "200")
    assert run.prepare[0].tokenizer.vocab_size == 200


def test_it_imports_no_jax():
    code = "import sys, flaxpretrain.data.prepare; assert 'jax' not in sys.modules"
    root = Path(__file__).parent.parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize("name", ["quickstart", "quickstart_30min"])
def test_the_quickstart_recipes_prepare_what_their_model_is_for(name):
    run = load_recipe(Path(__file__).parent.parent.parent / "configs" / f"{name}.py")
    (prepare,) = run.prepare
    assert prepare.tokenizer.vocab_size == run.model.vocab_size
    assert isinstance(prepare.source, InterpreterText)
