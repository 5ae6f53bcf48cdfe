"""--dry-run: the recipe, parameters by module, cost before starting, a picture of the schedule."""

import io
import json

import jax
import pytest
from rich.console import Console

from flaxpretrain.analysis import plan
from flaxpretrain.analysis.throughput import synthetic_dataset
from flaxpretrain.config import Data, Phase, Precision, render
from flaxpretrain.data.rows import Blocks
from flaxpretrain.errors import UserError
from flaxpretrain.hardware import HardwareRule
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble
from flaxpretrain.training.schedules import WarmupLinear
from tests import toys


def printed(run, workdir):
    """What the plan of a run prints."""
    out = io.StringIO()
    plan.print_plan(run, workdir, Console(file=out, width=100))
    return out.getvalue()


def test_a_plan_without_a_dataset_says_so_and_trains_nothing(tmp_path):
    workdir = tmp_path / "work"
    text = printed(toys.run(), workdir)
    assert "dataset: not built yet" in text and not workdir.exists()
    for words in (
        "parameters: ",
        "devices: 8 x cpu",
        "phase 0: 6 steps of 8 rows",
        "checkpoints: ",
    ):
        assert words in text


def test_the_rendered_recipe_comes_first_and_is_json(tmp_path):
    run = toys.run()
    text = printed(run, tmp_path)
    rendered, _ = json.JSONDecoder().raw_decode(text)
    assert rendered == render(run)


def test_the_rule_for_the_devices_is_shown(tmp_path):
    rules = (HardwareRule("cpu", {"remat": "full"}, tokens_per_device=64),)
    text = printed(toys.run(hardware=rules), tmp_path)
    assert "hardware rule 'cpu': remat = full, at most 64 tokens a device at once" in text


def test_products_in_8_bits_are_shown(tmp_path):
    pytest.importorskip("qwix")
    text = printed(toys.run(precision=Precision(matmul="int8_forward")), tmp_path)
    assert "matrix products of the layers: int8_forward" in text
    assert "matrix products" not in printed(toys.run(), tmp_path)


def test_with_a_dataset_the_plan_counts_epochs_and_padding(tmp_path):
    synthetic_dataset(tmp_path / "data", toys.VOCABULARY, tokens=3000)
    data = Data(layout=Blocks(), folder=str(tmp_path / "data"))
    run = toys.run(data=data, phases=(Phase(epochs=2, length=32, batch_size=8),))
    # 3,000 tokens in rows of 30 and two special tokens: 100 rows, 25 steps for two epochs.
    assert "phase 0: 25 steps" in (text := printed(run, tmp_path))
    assert "2.00 epochs of 100 rows, 0.0% padding" in text


def test_a_phase_in_epochs_needs_the_dataset(tmp_path):
    run = toys.run(phases=(Phase(epochs=1, length=32, batch_size=8),))
    with pytest.raises(UserError, match="build the dataset first, or say --set steps=N"):
        printed(run, tmp_path)


def test_the_parameter_table_adds_up():
    assembly = assemble(toys.run(), sharding.make_mesh(), 6)
    table = plan.parameter_table(assembly)
    total = sum(leaf.size for leaf in jax.tree.leaves(assembly.state.params))
    counts = [int(cell.replace(",", "")) for cell in table.columns[1].cells]
    assert table.title == f"parameters: {total:,}" and sum(counts) == total


def test_the_picture_shows_the_peak_and_the_run_s_length():
    run = toys.run(schedule=WarmupLinear(warmup_steps=500))
    lines = plan.schedule_picture(run, 1000, width=40, height=4).splitlines()
    assert len(lines) == 6 and 0.9e-3 < float(lines[0].split()[0]) <= 1e-3
    assert "WarmupLinear" in lines[-1] and lines[-1].endswith("1000")
    # Warm-up reaches the top row in the middle of the run.
    assert lines[0].index("█") > 20
