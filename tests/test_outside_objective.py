"""The objective that the README teaches to write: one file outside the checkout does it all."""

import re
from pathlib import Path

import pytest

from flaxpretrain.main import main
from flaxpretrain.training.metrics import read_metrics
from tests import toys

ROOT = Path(__file__).parent.parent

RECIPE = """
from restored_tokens import RestoredTokens
from flaxpretrain.conversion.finish import Export
from tests import toys

def recipe():
    return toys.packed_run(
        {folder!r}, steps=4, objective=RestoredTokens(), finish=(Export(compare=False),)
    )
"""


@pytest.fixture
def outside(tmp_path):
    """A folder with the README's objective and a recipe that uses it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    source = next(block for block in blocks if "class RestoredTokens" in block)
    (tmp_path / "restored_tokens.py").write_text(source)
    folder = toys.dataset(tmp_path / "data")
    (tmp_path / "outside_recipe.py").write_text(RECIPE.format(folder=str(folder)))
    return tmp_path


def test_it_trains_resumes_and_exports(outside):
    recipe, workdir = str(outside / "outside_recipe.py"), outside / "w"
    assert main([recipe, "--workdir", str(workdir), "--quiet"]) == 0
    assert main([recipe, "--workdir", str(workdir), "--quiet", "--set", "steps=6"]) == 0
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss/restored"] == pytest.approx(rows[-1]["loss"], rel=1e-6)
    exported = {path.name for path in (workdir / "hf").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= exported
