"""The builder's program: ELECTRA's flags, one clear line for a mistake, and a kill survived."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.range_server import RangeServer
from flaxpretrain.data import remote_text
from flaxpretrain.data.files import RemoteFiles
from flaxpretrain.data.store import open_dataset, partial_folder
from flaxpretrain.electra_hparams import HParams, run_of
from flaxpretrain.errors import UserError

TOOLS = Path(__file__).parent.parent.parent / "tools"
VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] the river town Town ran ##s cafe café . ,".split()


def start(tool, *arguments):
    return subprocess.Popen(
        [sys.executable, TOOLS / f"{tool}.py", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(tool, *arguments):
    process = start(tool, *arguments)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("The river ran.\nThe town.\n\nThe river runs, the river.\n")
    (folder / "b.txt").write_text("\n".join("the Café in the Town ." for _ in range(40)))
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return folder


def build_arguments(corpus, *more):
    vocab, output = corpus.parent / "vocab.txt", corpus.parent / "data"
    common = ["--corpus-dir", corpus, "--vocab-file", vocab, "--output-dir", output]
    return [*common, "--num-processes", "1", "--validation-share", "0", *more]


def test_electras_command_builds_and_says_what_it_built(corpus):
    code, output, errors = run(
        "build_pretraining_dataset",
        *build_arguments(corpus, "--max-seq-length", "16", "--blanks-separate-docs", "False"),
        *("--no-lower-case", "--no-strip-accents", "--licence", "CC0-1.0", "--language", "en"),
    )
    assert code == 0, errors
    assert "train: 2 documents, 43 sentences" in output and "0 lost" in output
    assert "rows of 16, documents packed" in output
    dataset = open_dataset(corpus.parent / "data")
    assert dataset.metadata["licence"] == "CC0-1.0"
    assert "building: " in errors


def test_rows_of_the_original_are_recorded_and_their_losses_told(corpus):
    flags = ("--max-seq-length", "16", "--compat", "electra", "--seed", "5")
    code, output, errors = run("build_pretraining_dataset", *build_arguments(corpus, *flags))
    assert code == 0, errors
    (line,) = [line for line in output.splitlines() if "--compat electra" in line]
    assert "tokens (" in line and "% padding" in line and "of two segments" in line
    assert line.endswith("Data(layout=ElectraSegments(seed=5))")
    assert open_dataset(corpus.parent / "data").metadata["build"]["compat"] == "electra"
    # The store is the same; only the note differs.
    code, _, errors = run("build_pretraining_dataset", *build_arguments(corpus, "--seed", "5"))
    assert code == 2 and "build.compat: 'electra' there, None wanted" in errors


def test_vocabulary_output_and_workdirs_may_lie_in_the_folder_of_the_text(corpus):
    """As in tutorials of the original, which call that folder DATA_DIR."""
    vocab, output = corpus / "vocab.txt", corpus / "pretrain_tfrecords"
    (corpus.parent / "vocab.txt").rename(vocab)
    (corpus / "models" / "x" / "checkpoints").mkdir(parents=True)
    (corpus / "models" / "x" / "checkpoints" / "weights").write_bytes(b"\xff")
    arguments = ["--corpus-dir", corpus, "--vocab-file", vocab, "--output-dir", output]
    arguments += ["--num-processes", "1", "--do-strip-accents", "--blanks-separate-docs", "False"]
    for said in ("no part of the corpus: ", "is built already"):
        code, text, errors = run("build_pretraining_dataset", *arguments)
        assert code == 0 and said in errors, errors
        assert "train: 2 documents, 43 sentences" in text
    assert run_of(HParams(), "x", corpus).data.folder == str(output)


def test_case_and_accents_follow_the_flags(corpus):
    unknown = []
    for flags in (["--no-lower-case"], ["--do-lower-case"]):
        arguments = build_arguments(corpus, "--overwrite", *flags)
        assert run("build_pretraining_dataset", *arguments)[0] == 0
        metadata = open_dataset(corpus.parent / "data").metadata
        unknown.append(metadata["splits"]["train"]["unknown"])
    # Without lower-casing "The" and "Café" are unknown.
    assert unknown[0] - unknown[1] == 3 + 40


def test_the_same_command_again_has_nothing_to_do(corpus):
    assert run("build_pretraining_dataset", *build_arguments(corpus))[0] == 0
    code, output, errors = run("build_pretraining_dataset", *build_arguments(corpus))
    assert code == 0 and "built already" in errors and "train: 3 documents" in output


MISTAKES = {
    "no folder": (["--corpus-dir", "nowhere"], "no file or folder nowhere"),
    "no vocabulary": (["--vocab-file", "nowhere.txt"], "nowhere.txt"),
    "a boolean": (["--blanks-separate-docs", "perhaps"], "expected True or False; got 'perhaps'"),
    "contradiction": (
        ["--blanks-separate-docs", "True", "--format", "lines"],
        "--blanks-separate-docs True contradicts --format lines",
    ),
    "both tokenizers": (["--tokenizer", "x"], "not allowed with"),
    "row length": (["--max-seq-length", "2"], "--max-seq-length 2"),
    "share": (["--validation-share", "7"], "validation share"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_one_line_and_exit_code_2(corpus, mistake):
    flags, message = MISTAKES[mistake]
    code, output, errors = run("build_pretraining_dataset", *build_arguments(corpus, *flags))
    assert code == 2 and message in errors
    lines = [line for line in errors.splitlines() if not line.startswith("building: ")]
    assert len(lines) == 1 and "Traceback" not in errors


def test_text_that_is_not_utf8_is_named_and_may_be_replaced(corpus):
    (corpus / "c.txt").write_bytes(b"the river\nthe \xe9\n")
    code, _, errors = run("build_pretraining_dataset", *build_arguments(corpus))
    assert code == 2 and "c.txt is not UTF-8: byte 14, line 2" in errors
    arguments = build_arguments(corpus, "--errors", "replace")
    assert run("build_pretraining_dataset", *arguments)[0] == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(corpus):
    corpus.parent.chmod(0o555)
    try:
        code, _, errors = run("build_pretraining_dataset", *build_arguments(corpus))
    finally:
        corpus.parent.chmod(0o755)
    assert code == 2 and "cannot write" in errors and "Permission denied" in errors


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_build_that_is_killed_goes_on(corpus):
    line = "the river ran , the town ran . the cafe runs , the river ran in the town .\n"
    document = line * 20 + "\n"
    text = "".join(f"{number} " + document for number in range(1500))
    (corpus / "large.txt").write_text(text)
    arguments = build_arguments(corpus, "--shard-megabytes", "1", "--num-processes", "2")
    output, whole = corpus.parent / "data", corpus.parent / "whole"

    process = start("build_pretraining_dataset", *arguments)
    state = partial_folder(output) / "state.json"
    end = time.monotonic() + 60
    while not state.exists() and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not output.exists() and partial_folder(output).exists()

    code, _, errors = run("build_pretraining_dataset", *arguments)
    assert code == 0 and "going on with an interrupted build" in errors
    assert not partial_folder(output).exists()
    assert run("build_pretraining_dataset", *arguments, "--output-dir", whole)[0] == 0
    assert hashes(output) == hashes(whole)
    assert len(open_dataset(output).split("train").shards) > 1


def test_a_tokenizer_is_trained_and_used(corpus):
    tokenizer = corpus.parent / "tokenizer"
    common = ["--corpus-dir", corpus, "--vocab-size", "60", "--output-dir", tokenizer]
    code, output, errors = run("train_tokenizer", *common)
    assert code == 0, errors
    assert "mask [MASK]" in output and "sample: [CLS] the" in output
    code, _, errors = run("train_tokenizer", *common)
    assert code == 2 and "--overwrite" in errors
    code, output, errors = run(
        "build_pretraining_dataset",
        *("--corpus-dir", corpus, "--tokenizer", tokenizer, "--output-dir", corpus.parent / "data"),
        *("--num-processes", "1", "--validation-share", "0"),
    )
    assert code == 0, errors
    assert "0.000% unknown" in output


@pytest.mark.parametrize("model, size", [("bpe", 300), ("unigram", 40)])
def test_other_families_are_trained(corpus, model, size):
    folder = corpus.parent / model
    code, output, errors = run(
        "train_tokenizer",
        *("--files", corpus / "a.txt", corpus / "b.txt", "--model", model),
        *("--vocab-size", size, "--output-dir", folder, "--lowercase"),
    )
    assert code == 0, errors
    assert (folder / "tokenizer.json").exists() and "sample:" in output


def test_training_mistakes_are_one_line(corpus):
    arguments = ["--corpus-dir", corpus, "--output-dir", corpus.parent / "t", "--vocab-size"]
    for more, message in [
        ([3], "vocabulary of 3 is too small"),
        ([300, "--model", "unigram", "--character-coverage", 2], "--character-coverage is above 0"),
    ]:
        code, _, errors = run("train_tokenizer", *arguments, *more)
        assert code == 2 and message in errors and len(errors.splitlines()) == 1


def test_records_in_parts_with_splits_of_their_own(tmp_path):
    """JSON lines in two parts, put together; a broken line skipped and counted."""
    rows = "".join(f'{{"body": "the river ran {n}"}}\n' for n in range(30))
    (tmp_path / "a.jsonl").write_text(rows + "{\n")
    (tmp_path / "b.txt").write_text("the town\n")
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, *"0123456789"]) + "\n")
    flags = ["--corpus-dir", tmp_path / "a.jsonl", "--vocab-file", tmp_path / "vocab.txt"]
    flags += ["--output-dir", tmp_path / "data", "--text-column", "body", "--num-processes", "1"]
    flags += ["--held-out", f"validation={tmp_path / 'b.txt'}", "--max-seq-length", "16"]
    code, _, errors = run("build_pretraining_dataset", *flags, "--shard", "0/2")
    assert code == 2 and "a.jsonl, line 31: no JSON" in errors and "--skip-broken" in errors
    for part in ("0/2", "1/2"):
        given = (*flags, "--skip-broken", "--shard", part)
        code, output, errors = run("build_pretraining_dataset", *given)
        assert code == 0 and f"part {part} is " in output, errors
    merging = ("--output-dir", tmp_path / "data", "--merge", "2", "--max-seq-length", "16")
    code, output, errors = run("build_pretraining_dataset", *merging)
    assert code == 0, errors
    assert "train: 30 documents" in output and "validation: 1 documents" in output
    code, _, errors = run("build_pretraining_dataset", *flags[2:], "--source", "web:x")
    assert code == 2 and "web:x: expected hf:NAME" in errors


def test_text_behind_urls_builds_the_same_dataset_though_the_server_fails(
    corpus, tool, monkeypatch
):
    monkeypatch.setattr(RemoteFiles, "first_pause_seconds", 0.001)
    remote_text._files.cache_clear()
    main, read = tool("build_pretraining_dataset").main, RemoteFiles.read

    def build(where, output):
        flags = ["--num-processes", "1", "--vocab-file", corpus.parent / "vocab.txt"]
        flags += ["--corpus-dir", f"{where}/a.txt", "--corpus-dir", f"{where}/b.txt"]
        main([str(flag) for flag in (*flags, "--output-dir", output)])

    with RangeServer(corpus) as server:

        def breaks_down(self, name, begin, end):
            if name == "b.txt":
                server.fail_every = 1
            return read(self, name, begin, end)

        far, near = corpus.parent / "far", corpus.parent / "near"
        monkeypatch.setattr(RemoteFiles, "read", breaks_down)
        with pytest.raises(UserError, match="b.txt cannot be read .*503"):
            build(server.url, far)
        assert not far.exists()
        monkeypatch.setattr(RemoteFiles, "read", read)
        server.fail_every = 0
        build(server.url, far)
    build(corpus, near)
    for path in filter(Path.is_file, near.rglob("*")):
        assert (far / path.relative_to(near)).read_bytes() == path.read_bytes()


def test_a_url_as_output_is_refused_in_one_line(corpus, tool, capsys):
    arguments = [*build_arguments(corpus), "--output-dir", "gs://bucket/data"]
    with pytest.raises((SystemExit, UserError)) as e:
        tool("build_pretraining_dataset").main([str(a) for a in arguments])
    assert "gs://bucket/data is a URL" in str(e.value) + capsys.readouterr().err
    assert not Path("gs:").exists()
