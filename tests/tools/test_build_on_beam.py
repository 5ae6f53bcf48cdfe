"""The builder fanned out on Beam gives what its parts give one after the other."""

import json

import pytest

from flaxpretrain.data.fan_out import FailedPart, build_part, merge_parts
from flaxpretrain.data.store import open_dataset
from tests.data.test_building import hashes
from tests.tools.test_build_pretraining_dataset import VOCABULARY, run


@pytest.fixture
def flags(tmp_path):
    rows = [json.dumps({"text": f"the river ran . {n}"}) for n in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, *"0123456789"]) + "\n")
    return ["--corpus-dir", tmp_path / "a.jsonl", "--vocab-file", tmp_path / "vocab.txt"]


def test_beam_builds_the_parts_and_puts_them_together(flags, tmp_path):
    pytest.importorskip("apache_beam")
    beam = ("--parts", "3", "--output-dir", tmp_path / "data", "--beam=--runner=DirectRunner")
    code, output, errors = run("build_on_beam", *beam, *flags)
    assert code == 0, errors
    assert "tokens from 3 parts" in output
    for part in range(3):
        given = (*flags, "--output-dir", tmp_path / "one", "--shard", f"{part}/3")
        code, _, errors = run("build_pretraining_dataset", *given)
        assert code == 0, errors
    merging = ("--output-dir", tmp_path / "one", "--merge", "3", "--max-seq-length", "16")
    assert run("build_pretraining_dataset", *merging)[0] == 0
    assert hashes(tmp_path / "data") == hashes(tmp_path / "one")
    splits = open_dataset(tmp_path / "data").splits.values()
    assert sum(split.documents for split in splits) == 30


def test_what_is_wrong_with_a_part_is_one_line(flags, tmp_path):
    pytest.importorskip("apache_beam")
    (tmp_path / "a.jsonl").write_text("{\n")
    beam = ("--parts", "2", "--output-dir", tmp_path / "data", "--beam=--runner=DirectRunner")
    code, _, errors = run("build_on_beam", *beam, *flags)
    assert code == 2 and "a.jsonl, line 1: no JSON" in errors.strip().split("\n")[-1]


def test_flags_of_single_parts_are_refused(flags, tmp_path):
    given = ("--parts", "2", "--output-dir", tmp_path / "data", "--shard", "0/2", *flags)
    code, _, errors = run("build_on_beam", *given)
    assert code == 2 and "--shard is set for each part by this program" in errors


def test_a_part_is_one_run_of_the_builder():
    with pytest.raises(FailedPart, match="part 1/4: --shard 1/4 --num-processes 1"):
        build_part(1, 4, ["bash", "-c", 'echo oh >&2; echo "$@" >&2; exit 2', "_"])
    assert build_part(3, 4, ["true"]) == 3
    with pytest.raises(FailedPart, match=r"parts \[1\] are missing"):
        merge_parts([0, 2], "nowhere", 3, False)
