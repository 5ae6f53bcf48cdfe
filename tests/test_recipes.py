"""Every recipe in configs/ loads, builds on eight devices, and is what its golden files say.

After a change that is meant, UPDATE_GOLDEN=1 rewrites the files under tests/golden/.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from flaxpretrain.analysis.pods import pod_of
from flaxpretrain.analysis.search import mesh_text
from flaxpretrain.config import Mesh, load_recipe, on_hardware, parse, render
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble, stand_in_vocabulary
from flaxpretrain.training.state import named_leaves

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
RECIPES = sorted((ROOT / "configs").glob("*.py"))

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


MESHES = {
    "all-axes": Mesh(data=2, fsdp=2, tensor=2),
    "data": Mesh(data=8, shard_optimizer=True),
}


@functools.cache
def assembled(path, mesh_name):
    """A recipe on one of the meshes, abstract."""
    settings = MESHES[mesh_name]
    run = dataclasses.replace(load_recipe(path), mesh=settings)
    mesh = sharding.mesh_of(settings)
    with jax.set_mesh(mesh):
        return assemble(run, mesh, sum(phase.steps or 1 for phase in run.phases))


def assert_golden(path, text):
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"no golden file {path.name}: run the test with UPDATE_GOLDEN=1"
    assert text == path.read_text(), "what is and golden differ; if meant, UPDATE_GOLDEN=1"


@every_recipe
def test_a_recipe_renders_as_its_golden_file_says(path):
    text = json.dumps(render(load_recipe(path)), indent=1) + "\n"
    assert_golden(GOLDEN / f"{path.stem}.json", text)


@pytest.mark.parametrize("pattern", ["*.json", "sharding/*.txt"])
def test_every_golden_file_has_its_recipe(pattern):
    assert {path.stem for path in GOLDEN.glob(pattern)} == {path.stem for path in RECIPES}


def written(spec, shape):
    """Mesh axes of each dimension: `tensor+fsdp .`."""
    dimensions = [*spec, *[None] * (len(shape) - len(spec))]
    names = ["." if d is None else d if isinstance(d, str) else "+".join(d) for d in dimensions]
    return " ".join(names) or "."


def placed(assembly):
    """Parameter -> its placement, and that of its moments where this is another."""
    params = named_leaves(assembly.state.params)
    lines = {name: written(leaf.sharding.spec, leaf.shape) for name, leaf in params.items()}
    others = {name: set() for name in params}
    for name, leaf in named_leaves(assembly.state.opt_state).items():
        followed = sharding.followed_parameter(name, params)
        text = written(leaf.sharding.spec, leaf.shape)
        same = followed is not None and leaf.shape == params[followed].shape
        if same and text != lines[followed]:
            others[followed].add(text)
    return {
        name: " ".join([line, *(f"(optimizer {o})" for o in sorted(others[name]))])
        for name, line in lines.items()
    }


@every_recipe
def test_parameters_and_optimizer_lie_as_the_golden_file_says(path):
    whole, split = (placed(assembled(path, name)) for name in MESHES)
    shapes = named_leaves(assembled(path, "data").state.params)
    lines = [" | ".join(f"mesh {mesh_text(mesh)}" for mesh in MESHES.values())]
    for name, leaf in shapes.items():
        size = "x".join(map(str, leaf.shape))
        lines.append(f"{name} {size}: {whole[name]} | {split[name]}")
    assert_golden(GOLDEN / "sharding" / f"{path.stem}.txt", "\n".join(lines) + "\n")


@every_recipe
def test_a_rendered_recipe_can_be_rebuilt(path):
    run = load_recipe(path)
    assert parse(json.loads(json.dumps(render(run)))) == run


@every_recipe
@pytest.mark.parametrize("mesh", MESHES)
def test_a_recipe_builds_on_eight_devices(path, mesh):
    assembly = assembled(path, mesh)
    run = assembly.run
    assert all(leaf.sharding is not None for leaf in jax.tree.leaves(assembly.state))
    for phase in run.phases:
        assembly.train_step(phase)  # refuses a batch that the mesh does not divide
        batch = assembly.batch_spec(phase, stand_in_vocabulary(run))
        assert {leaf.shape[0] for leaf in batch.values()} == {phase.batch_size}
        assert assembly.flops_per_step(phase, stand_in_vocabulary(run)) > 0


class Device:
    """As much of a device as hardware rules look at."""

    def __init__(self, kind):
        self.device_kind = kind


@every_recipe
def test_each_hardware_rule_of_a_recipe_can_be_applied(path):
    run = load_recipe(path)
    kinds = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "NVIDIA H100 80GB HBM3")
    reached = set()
    for kind in (*kinds, "NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB"):
        for count in (2**n for n in range(9)):
            rules = [r for r in run.hardware if r.fits(kind, count)]
            reached |= {str(r) for r in rules[:1]}
            changed = on_hardware(run, [Device(kind)] * count)
            # What is learnt stays, and every device still gets rows of every microbatch.
            assert [p.batch_size for p in changed.phases] == [p.batch_size for p in run.phases]
            for phase in changed.phases if rules else ():
                even = phase.batch_size % count == 0
                assert not even or phase.batch_size % (phase.microbatches * count) == 0
    assert reached == {str(rule) for rule in run.hardware}, "a rule that never applies"


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
