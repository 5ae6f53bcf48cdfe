"""tools/evaluate.py as its users run it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flaxpretrain.data.store import open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.evaluation.fixed_masks import baselines, settings_of
from flaxpretrain.evaluation.subject import open_subject
from flaxpretrain.training.metrics import read_metrics
from tests.tolerances import EVALUATION_ANYWHERE

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def evaluate(tool, capsys):
    main = tool("evaluate").main

    def run(*arguments):
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


def test_json_is_one_object_with_the_figures_of_the_run(evaluate, workdir):
    result = json.loads(evaluate(workdir, "--json"))
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    figures = result["figures"]
    np.testing.assert_allclose(
        figures["loss"], last["validation/masked_lm"], rtol=EVALUATION_ANYWHERE
    )
    assert result["step"] == 4 and result["length"] == 16 and result["split"] == "validation"
    assert 0 <= figures["masked_lm_accuracy"] <= 1
    assert figures["perplexity"] == pytest.approx(np.exp(figures["loss"]))
    assert result["objective"]["masking"]["rate"] == 0.15


def test_batch_size_and_mesh_change_no_figure(evaluate, workdir):
    results = [
        json.loads(evaluate(workdir, "--json", *flags))["figures"]["loss"]
        for flags in (["--batch-size", 3], ["--batch-size", 40, "--fsdp", 2, "--tensor", 2])
    ]
    np.testing.assert_allclose(*results, rtol=EVALUATION_ANYWHERE)


def test_baselines_are_scored_at_the_same_positions(evaluate, workdir, data):
    text = evaluate(workdir, "--baselines", "--rate", 0.3)
    settings = settings_of(open_subject(workdir), rate=0.3)
    nats = baselines(open_dataset(data), settings)
    assert f"unigram {nats.unigram:.4f}" in text and f"bigram {nats.bigram:.4f}" in text
    assert f"{nats.positions:,} masked positions" in text
    assert json.loads(evaluate(workdir, "--baselines", "--json"))["baselines"]["positions"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split", "test"], "no split 'test'"),
        (["--length", "1000"], "--length 1000: .* positions for 64"),
        (["--length", "2"], "no room for text"),
        (["--batch-size", "0"], "--batch-size must be positive"),
        (["--rate", "2"], "rate must be above 0"),
        (["--step", "3"], "3"),
        (["--tensor", "3"], "does not fit 8 devices"),
        (["--data-dir", "nothing"], "nothing is no dataset"),
    ],
)
def test_a_mistake_is_refused(evaluate, workdir, flags, message):
    with pytest.raises(UserError, match=message):
        evaluate(workdir, *flags)


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "tools/evaluate.py", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "evaluate.py: error:" in done.stderr


def test_a_decoder_has_perplexity_and_bits_per_byte(evaluate, decoder, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    facts = json.loads((folder / "dataset.json").read_text())
    facts["splits"]["validation"]["bytes"] = 1000
    (folder / "dataset.json").write_text(json.dumps(facts))
    figures = json.loads(evaluate(decoder, "--data-dir", folder, "--json"))["figures"]
    assert figures["perplexity"] == pytest.approx(np.exp(figures["causal_lm"]))
    assert 0 < figures["bits_per_byte"] < 8 and 0 < figures["causal_lm_accuracy"] < 1
    assert "bits_per_byte" in evaluate(decoder, "--data-dir", folder)


def test_an_encoder_decoder_has_the_loss_and_accuracy_of_its_own_noise(evaluate, encoder_decoder):
    figures = json.loads(evaluate(encoder_decoder, "--json"))["figures"]
    last = read_metrics(encoder_decoder / "metrics.jsonl")[-1]
    assert figures["loss"] == pytest.approx(last["validation/denoising"], rel=EVALUATION_ANYWHERE)
    assert 0 <= figures["denoising_accuracy"] <= 1


def test_pairs_are_answered(evaluate, decoder, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"source": "the cat", "target": t} for t in ("sees milk .", "milk milk")]
    path.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--exact-match", path, "--max-new-tokens", 3, "--show", 1]
    found = json.loads(evaluate(decoder, *flags, "--json"))
    assert found["pairs"] == 2 and len(found["answers"]) == 1
    assert 0 <= found["generated_exact_match"] <= 0.5
    assert found["teacher_forced"].keys() == {"loss", "perplexity", "accuracy", "exact_match"}
    assert "exact_match" in evaluate(decoder, *flags)
