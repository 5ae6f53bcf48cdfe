"""The loader benchmark runs, and says what it measured."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "loader.py"


@pytest.mark.hf
def test_the_loader_benchmark_prints_and_saves_its_figures(tmp_path):
    output = tmp_path / "results" / "loader.json"
    options = "--tokens 30000 --lengths 64 --batch-tokens 2048 --seconds 0.01 --repeats 2"
    done = subprocess.run(
        [sys.executable, PROGRAM, *options.split(), "--output", output],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(output.read_text())
    assert result["threads"] == 1
    assert result["command"].endswith(f"{options} --output RESULT.json")
    assert [f["layout"] for f in result["pipeline"]] == ["Blocks", "Documents"]
    assert all(f["tokens_per_second"] > 0 for f in result["pipeline"])
    if importlib.util.find_spec("torch"):  # the collator beside it is PyTorch's
        assert all(f["ratio"] > 0 for f in result["pipeline"])
    assert str(tmp_path) not in done.stdout
