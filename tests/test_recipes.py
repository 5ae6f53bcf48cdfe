"""Every recipe in configs/ loads, builds on eight devices, and is what its golden file says.

After a change that is meant, UPDATE_GOLDEN=1 rewrites the files under tests/golden/.
"""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from flaxpretrain.analysis.pods import pod_of
from flaxpretrain.config import load_recipe, parse, render
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble, stand_in_vocabulary

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
RECIPES = sorted((ROOT / "configs").glob("*.py"))

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@every_recipe
def test_a_recipe_renders_as_its_golden_file_says(path):
    text = json.dumps(render(load_recipe(path)), indent=1) + "\n"
    golden = GOLDEN / f"{path.stem}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert golden.exists(), f"no golden file of {path.name}: run the test with UPDATE_GOLDEN=1"
    assert text == golden.read_text(), "recipe and golden differ; if meant, UPDATE_GOLDEN=1"


def test_every_golden_file_has_its_recipe():
    assert {path.stem for path in GOLDEN.glob("*.json")} == {path.stem for path in RECIPES}


@every_recipe
def test_a_rendered_recipe_can_be_rebuilt(path):
    run = load_recipe(path)
    assert parse(json.loads(json.dumps(render(run)))) == run


@every_recipe
@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 2, 2)], ids=["data", "all-axes"])
def test_a_recipe_builds_on_eight_devices(path, axes):
    run = load_recipe(path)
    mesh = sharding.make_mesh(*axes)
    with jax.set_mesh(mesh):
        assembly = assemble(run, mesh, sum(phase.steps or 1 for phase in run.phases))
    assert all(leaf.sharding is not None for leaf in jax.tree.leaves(assembly.state))
    for phase in run.phases:
        assembly.train_step(phase)  # refuses a batch that the mesh does not divide
        batch = assembly.batch_spec(phase, stand_in_vocabulary(run))
        assert {leaf.shape[0] for leaf in batch.values()} == {phase.batch_size}
        assert assembly.flops_per_step(phase, stand_in_vocabulary(run)) > 0


@every_recipe
def test_a_recipe_says_how_to_run_it_and_names_its_slice(path):
    assert f"configs/{path.name}" in path.read_text().split('"""')[1]
    assert pod_of(path).startswith(("v4:", "v5e:", "v5p:", "v6e:", "tpu7x:"))


@every_recipe
def test_the_schedule_reaches_its_peak_and_no_more(path):
    run = load_recipe(path)
    # A phase in epochs has as many steps as the dataset gives it.
    steps = sum(phase.steps or 1_000 for phase in run.phases)
    at = np.unique(np.linspace(0, steps - 1, 200).astype(int))
    factors = [float(run.schedule.factor(int(step), steps)) for step in at]
    assert 0.5 < max(factors) <= 1.0 + 1e-6
