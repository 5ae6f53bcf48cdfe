"""tools/generate.py as its users run it."""

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
def generate(tool, capsys):
    main = tool("generate").main

    def run(*arguments):
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


def test_texts_are_printed_after_their_prompts_and_their_variety_at_the_end(generate, decoder):
    lines = generate(decoder, "the cat", "the king", "--max-new-tokens", 3).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("the cat ") and lines[0].split()[2] in speech.DOES
    assert lines[1].startswith("the king ") and lines[2].startswith("distinct-1 ")


def test_json_is_one_object_a_text_and_one_of_diversity(generate, decoder):
    flags = ["--top-p", 0.9, "--count", 3, "--max-new-tokens", 8, "--json"]
    first, second, last = map(json.loads, generate(decoder, "the cat", "a", *flags).splitlines())
    assert first["text"] == "the cat" and len(second["generated"]) == 3
    assert first["generated"][0].keys() == {"text", "ids", "ended", "score"}
    assert 0 < last["diversity"]["distinct_1"] <= 1
    again = generate(decoder, "the cat", "a", *flags).splitlines()
    assert json.loads(again[0]) == first
    assert (
        json.loads(generate(decoder, "the cat", "a", *flags, "--seed", 1).splitlines()[0]) != first
    )


def test_beams_print_their_scores(generate, encoder_decoder):
    out = generate(encoder_decoder, "the [MASK] .", "--beams", 3, "--count", 2, "--json")
    scores = [each["score"] for each in json.loads(out.splitlines()[0])["generated"]]
    assert scores == sorted(scores, reverse=True)


def test_next_tokens_have_probabilities_and_bars(generate, decoder):
    lines = generate(decoder, "the", "--next-token", "--top-k", 4).splitlines()
    assert lines[0] == "the" and len(lines) == 5
    assert lines[1].split()[0].endswith("%") and "█" in lines[1]
    assert lines[1].split()[-1].strip("'") in speech.WHO


def test_continuations_are_ranked(generate, decoder):
    flags = ["--continuations", "milk .", "sees milk ."]
    lines = generate(decoder, "--score", "the cat", *flags).splitlines()
    assert lines[0] == "the cat" and "sees milk ." in lines[1] and "3 tokens" in lines[1]
    (row,) = generate(decoder, "--score", "the cat", *flags, "--json").splitlines()
    assert json.loads(row)["continuations"][0]["text"] == "sees milk ."


def test_texts_may_come_from_standard_input(generate, decoder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\n\na cat\n"))
    rows = generate(decoder, "--max-new-tokens", 2, "--json").splitlines()
    assert [json.loads(row)["text"] for row in rows[:-1]] == ["the", "a cat"]


def test_a_hugging_face_folder_says_how_answers_begin(generate, tool, encoder_decoder, tmp_path):
    folder = ["--output-dir", str(tmp_path / "hf")]
    tool("convert_checkpoint").main(["to-hf", str(encoder_decoder), *folder, "--no-compare"])
    stated = {"forced_bos_token_id": 9, "eos_token_id": 3, "min_new_tokens": 2}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(stated))
    out = generate(tmp_path / "hf", "the [MASK] .", "--max-new-tokens", 4, "--json")
    # Before it stands what the converter said.
    ids = json.loads(out.splitlines()[-2])["generated"][0]["ids"]
    assert ids[0] == 9 and len(ids) >= 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a", "--beams", "20"], "--beams 20: the model has .* beams"),
        (["a", "--beams", "2", "--top-k", "3"], "--beams searches .* give one or the other"),
        (["a", "--count", "2"], "--count 2: .* same text"),
        (["a", "--temperature", "0"], "--temperature must be above 0"),
        (["a", "--max-new-tokens", "100"], "positions for 64"),
        (["a", "--forced-bos", "<x>"], "--forced-bos: the tokenizer has no token '<x>'"),
        (["--score", "a"], "go together: give both"),
        (["a", "--next-token", "--top-k", "99"], "--top-k must lie in 1 to"),
        ([], "no text"),
    ],
)
def test_a_mistake_is_refused(generate, decoder, flags, message, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(UserError, match=message):
        generate(decoder, *flags)


def test_an_encoder_is_one_line_and_exit_code_2(workdir):
    done = subprocess.run(
        [sys.executable, "tools/generate.py", str(workdir), "the cat"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("generate.py: error: the model has no language modelling head")
