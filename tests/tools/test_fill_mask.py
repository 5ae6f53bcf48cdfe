"""tools/fill_mask.py as its users run it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flaxpretrain.errors import UserError
from tests.evaluation import speech

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def fill(tool, capsys):
    main = tool("fill_mask").main

    def run(*arguments):
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


def test_guesses_are_printed_under_each_text(fill, workdir):
    lines = fill(workdir, "the cat [MASK] milk .", "the <mask> .", "--top-k", 2).splitlines()
    assert lines[0] == "the cat [MASK] milk ." and lines[3] == "the <mask> ."
    assert len(lines) == 6
    assert lines[1].split()[0].endswith("%") and lines[1].split()[-1] in speech.WORDS


def test_json_is_one_object_a_text(fill, workdir):
    first, second = map(
        json.loads, fill(workdir, "the [MASK] [MASK] .", "[MASK]", "--json").splitlines()
    )
    assert len(first["masks"]) == 2 and len(second["masks"]) == 1
    guesses = first["masks"][0]
    assert len(guesses) == 5 and guesses[0].keys() == {"token", "id", "probability"}
    shares = [guess["probability"] for guess in guesses]
    assert shares == sorted(shares, reverse=True)


def test_texts_may_come_from_standard_input(fill, workdir, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the [MASK] .\n\nthe cat [MASK] .\n"))
    rows = [json.loads(line) for line in fill(workdir, "--json").splitlines()]
    assert [row["text"] for row in rows] == ["the [MASK] .", "the cat [MASK] ."]


def test_special_tokens_only_when_admitted(fill, workdir):
    count = len(speech.SPECIALS) + len(speech.WORDS)
    (row,) = fill(workdir, "the [MASK]", "--special", "--top-k", count, "--json").splitlines()
    assert {g["token"] for g in json.loads(row)["masks"][0]} >= set(speech.SPECIALS)
    with pytest.raises(UserError, match="--top-k"):
        fill(workdir, "the [MASK]", "--top-k", count)


def test_no_text_is_refused(fill, workdir, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(UserError, match="no text"):
        fill(workdir)


def test_a_text_without_mask_is_one_line_and_exit_code_2(workdir):
    done = subprocess.run(
        [sys.executable, "tools/fill_mask.py", str(workdir), "the cat"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip().splitlines() == [
        "fill_mask.py: error: 'the cat' has no mask: write [MASK] (or <mask>) where a word is to "
        "be guessed"
    ]
