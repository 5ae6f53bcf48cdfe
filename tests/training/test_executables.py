"""Steps compiled ahead by another process: loaded where all agrees, else one line says what not."""

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys

import jax
import pytest

from flaxpretrain import main
from flaxpretrain.analysis import topology
from flaxpretrain.config import Data, Mesh, Phase, load
from flaxpretrain.data.buckets import LengthBuckets
from flaxpretrain.data.store import open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.hardware import overlap_options
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble
from flaxpretrain.training.compiler_options import compiler_options
from flaxpretrain.training.executables import (
    MANIFEST,
    Unusable,
    circumstances,
    compile_ahead,
    open_executables,
)
from flaxpretrain.training.metrics import read_metrics
from flaxpretrain.training.programs import lowered_step
from flaxpretrain.training.session import open_pipeline, step_shapes, total_steps
from tests import toys
from tests.training.processes import ROOT, ended, losses, started

RECIPE = """
from flaxpretrain.config import Mesh
from tests import toys
def recipe():
    return toys.packed_run({data!r}, mesh=Mesh({mesh}))
"""


def recipe_file(folder, mesh):
    """A toy of 12 steps, saved every 4."""
    data = folder / "data"
    if not data.exists():
        toys.dataset(data)
    path = folder / "toy.py"
    path.write_text(RECIPE.format(data=str(data), mesh=mesh))
    return path


def tool(recipe, folder, *more, devices=8):
    """tools/compile_ahead.py in a process of its own, with as many fake devices."""
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    command = [sys.executable, "tools/compile_ahead.py", str(recipe), "--output-dir", str(folder)]
    return subprocess.run(
        [*command, *more],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return recipe_file(tmp_path_factory.mktemp("ahead"), "data=2, fsdp=2, tensor=2")


@pytest.fixture(scope="module")
def compiled(recipe):
    """The folder that another process compiled for eight devices."""
    folder = recipe.parent / "compiled"
    done = tool(recipe, folder)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"wrote .*train_step-32x8-1-\w+\.bin: .* MB, traced in .* s, compiled in", done.stderr
    )
    return folder


@pytest.fixture
def mine(compiled, tmp_path):
    """A copy of that folder, to be damaged."""
    return shutil.copytree(compiled, tmp_path / "mine")


@pytest.fixture
def compilations(caplog):
    """Names of the functions that XLA compiles, or reads from its cache, so far."""
    jax.config.update("jax_log_compiles", True)
    caplog.set_level(logging.WARNING, "jax")
    yield lambda: re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
    jax.config.update("jax_log_compiles", False)


def run(recipe, workdir, *more):
    assert main.main([str(recipe), "--workdir", str(workdir), *more]) == 0


def figures(workdir):
    return [
        (row["step"], row["loss"], row["grad_norm"])
        for row in read_metrics(workdir / "metrics.jsonl")
        if "loss" in row
    ]


def seconds(workdir):
    return json.loads((workdir / "goodput.json").read_text())["seconds"]


def test_a_run_loads_its_step_and_computes_the_same_bit_for_bit(
    recipe, compiled, tmp_path, compilations, capsys
):
    plain, ahead = tmp_path / "plain", tmp_path / "ahead"
    run(recipe, plain)
    assert compilations().count("train_step") == 1 and seconds(plain)["load"] == 0
    run(recipe, ahead, "--compiled", str(compiled))
    assert compilations().count("train_step") == 1
    assert "the step of 8 rows of 32 was compiled ahead: traced in" in capsys.readouterr().err
    assert seconds(ahead)["load"] > 0 and seconds(ahead)["compile"] == 0
    assert figures(ahead) == figures(plain) and len(figures(plain)) == 12
    # From the checkpoint of step 8, on the loaded program again.
    shutil.rmtree(ahead / "checkpoints" / "12")
    run(recipe, ahead, "--compiled", str(compiled))
    assert compilations().count("train_step") == 1
    assert figures(ahead) == figures(plain)


def test_what_does_not_fit_is_compiled_and_said(recipe, compiled, tmp_path, compilations, capsys):
    sets = ("--set", "schedule.warmup_steps=3", "--set", "steps=2")
    run(recipe, tmp_path / "w", "--compiled", str(compiled), *sets)
    assert compilations().count("train_step") == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "--compiled" in line]
    assert told == [
        f"warning: --compiled {compiled} is not used, the step is compiled: the recipe has changed "
        "since: schedule.warmup_steps: 2 -> 3 and 1 more; tools/compile_ahead.py makes it anew"
    ]
    assert seconds(tmp_path / "w")["load"] > 0 and seconds(tmp_path / "w")["compile"] > 0


def refusal(recipe, folder, *overrides, mesh=None, environment=os.environ, **changes):
    """Why a run does not load from a folder; None where it does."""
    toy = load(recipe, overrides)
    toy = toy if mesh is None else dataclasses.replace(toy, mesh=mesh)
    mesh = sharding.mesh_of(toy.mesh)
    phase, steps = toy.phases[0], total_steps(toy.phases)
    with jax.set_mesh(mesh):
        assembly = assemble(toy, mesh, steps)
        options = compiler_options(mesh)
        lowered = lowered_step(assembly, assembly.train_step(phase), phase, toys.VOCABULARY)
        here = circumstances(assembly, steps, options, environment) | changes
        try:
            open_executables(folder).load(lowered, phase, here, mesh.devices.flatten().tolist())
        except Unusable as reason:
            return str(reason)
    return None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"jaxlib": "0.11.0"}, r"jaxlib: 0\.11\.0 here, [\d.]+ where it was compiled"),
        ({"compiler": "cl/1"}, "the compiler: cl/1 here, "),
        ({"processor": "0000"}, "the kind of CPU: 0000 here"),
        ({"device_kind": "TPU v4"}, "the device: TPU v4 here, cpu where it"),
        (
            {"placement": ["0 of process 0"]},
            "the order or the hosts of the devices: 1 of process 0 is gone",
        ),
        ({"compiler_options": {"a": 1}}, "the options of the compiler: a=1 here, none where"),
    ],
)
def test_other_circumstances_are_named(recipe, compiled, changes, reason):
    assert re.match(reason, refusal(recipe, compiled, **changes))


def test_another_mesh_other_flags_and_another_recipe_are_named(recipe, compiled):
    assert refusal(recipe, compiled) is None
    assert refusal(recipe, compiled, mesh=Mesh(data=4, tensor=2)) == (
        "the mesh: data=4, fsdp=1, tensor=2 here, data=2, fsdp=2, tensor=2 where it was compiled"
    )
    flags = {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_mine=1 --xla_dump_to=x"}
    differ = "the flags of XLA: --xla_mine=1 is new"
    assert refusal(recipe, compiled, environment=flags) == differ
    # How often it saves is no part of the step; the batch and the learning rate are.
    assert refusal(recipe, compiled, "checkpoints.every_steps=5") is None
    assert refusal(recipe, compiled, "batch_size=16") == (
        "it has no step of 16 rows of 32 in 1 microbatches"
    )
    assert refusal(recipe, compiled, "optimizer.learning_rate=0.5") == (
        "the recipe has changed since: optimizer.learning_rate: 0.001 -> 0.5"
    )


def test_damaged_folders_are_not_loaded(recipe, mine):
    file = next(mine.glob("*.bin"))
    payload = file.read_bytes()
    file.write_bytes(payload[:-1] + bytes([payload[-1] ^ 1]))
    assert "is damaged: its bytes are not those that were" in refusal(recipe, mine)
    file.write_bytes(payload[:1000])
    assert re.search(r"is damaged: 1,000 bytes of [\d,]+", refusal(recipe, mine))
    file.unlink()
    assert f"{file.name} is missing" in refusal(recipe, mine)
    manifest = mine / MANIFEST
    changed = json.loads(manifest.read_text())
    changed["programs"][0]["program"] = "0" * 64
    manifest.write_text(json.dumps(changed))
    assert "the code that traces the step, or the dataset's vocabulary" in refusal(recipe, mine)
    manifest.write_text(manifest.read_text()[:100])
    assert refusal(recipe, mine) == "its manifest.json is damaged or of another version"
    manifest.write_bytes(b"\xff\xfe")
    assert refusal(recipe, mine) == "its manifest.json is damaged or of another version"


def test_a_folder_without_programs_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match=r"--compiled .*: there is no manifest\.json in it; tools/"):
        open_executables(tmp_path)


def test_a_folder_may_lie_in_a_store(recipe, compiled):
    import fsspec

    store = fsspec.filesystem("memory")
    for path in compiled.iterdir():
        store.pipe_file(f"/compiled/{path.name}", path.read_bytes())
    assert refusal(recipe, "memory://compiled") is None


def test_each_length_of_buckets_has_a_program(recipe):
    data = Data(layout=LengthBuckets((8, 16)), folder=str(recipe.parent / "data"))
    toy = toys.run(data=data, phases=(Phase(steps=300, length=32, batch_size=8),))
    dataset = open_dataset(data.folder)
    shapes = step_shapes(toy, dataset, toy.phases)
    pipeline = open_pipeline(toy, dataset, toy.phases)
    assert {pipeline.shape(step) for step in range(300)} == set(shapes)
    assert [shape.length for shape in shapes] == [8, 16, 32]
    with pytest.raises(UserError, match="only the dataset tells which lengths have rows"):
        step_shapes(toy, None, toy.phases)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--slices", "2"), "--slices 2: expected 1 or more, and --topology beside it"),
        (("--data-dir", "none"), "none is no dataset: there is no such folder"),
        (("--set", "phases.0.seconds=60"), "a phase is given in seconds, which become steps when"),
        (
            ("--set", "phases.0.epochs=2", "--set", "data.folder=none"),
            "a phase is given in tokens or epochs, which only the dataset turns into steps",
        ),
    ],
)
def test_what_cannot_be_compiled_ahead_is_one_line(recipe, tmp_path, arguments, line):
    done = tool(recipe, tmp_path / "c", *arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert line in done.stderr and not (tmp_path / "c").exists()


@pytest.mark.tpu
def test_a_program_for_an_absent_slice_is_for_that_slice(tmp_path):
    pytest.importorskip("libtpu")
    topology.prepare_environment()
    toy = toys.run(mesh=Mesh(data=2, fsdp=2))
    assembly = topology.assembled_for(toy, "v5e:2x2")
    options = overlap_options("TPU v5 lite")
    said = []
    compile_ahead(assembly, toy.phases, toys.VOCABULARY, 6, options, tmp_path, said.append)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert (manifest["device_kind"], manifest["devices"]) == ("TPU v5 lite", 4)
    assert manifest["compiler"].startswith("cl/") and manifest["compiler_options"] == options
    assert manifest["placement"][1] == "1 of process 0, slice 0 at 1,0,0"
    [program] = manifest["programs"]
    payload = (tmp_path / program["file"]).read_bytes()
    assert b"TPU v5 lite" in payload and len(payload) == program["bytes"] and len(said) == 1

    def load_for(name):
        there = topology.assembled_for(toy, name)
        phase, devices = toy.phases[0], there.mesh.devices.flatten().tolist()
        step = there.train_step(phase, options)
        lowered = lowered_step(there, step, phase, toys.VOCABULARY)
        here = circumstances(there, 6, options)
        with pytest.raises(Unusable) as caught:
            open_executables(tmp_path).load(lowered, phase, here, devices)
        return str(caught.value)

    # Traced again, all agrees; what a slice loads cannot be read by a compiler without devices.
    assert "must be constructed with a Client to call DeserializeLoadedExec" in load_for("v5e:2x2")
    assert load_for("v6e:2x2").startswith("the device: TPU v6 lite here")


@pytest.mark.slow
def test_one_device_in_three_processes_of_their_own(tmp_path):
    recipe = recipe_file(tmp_path, "")
    folder = tmp_path / "compiled"
    assert tool(recipe, folder, devices=1).returncode == 0
    found = {}
    for name, extra in {"plain": (), "ahead": ("--compiled", str(folder))}.items():
        done = subprocess.run(
            [sys.executable, "run_pretraining.py", str(recipe), *extra]
            + ["--workdir", str(tmp_path / name), "--compile-cache", "none"],
            cwd=ROOT,
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT),
                "JAX_LOG_COMPILES": "1",
                "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1"),
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found[name] = done.stderr.count("Finished XLA compilation of jit(train_step)")
    assert found == {"plain": 1, "ahead": 0}
    assert figures(tmp_path / "ahead") == figures(tmp_path / "plain")


@pytest.mark.slow
def test_several_processes_load_all_or_none(tmp_path):
    # Programs of several processes hold what one start agreed on; on CPUs none can be loaded.
    recipe = recipe_file(tmp_path, "data=2")
    folder = tmp_path / "compiled"
    assert tool(recipe, folder, devices=2).returncode == 0
    with started(recipe, tmp_path / "w", 2, extra=("--compiled", str(folder))) as processes:
        codes, outputs = ended(processes)
    assert codes == [0, 0]
    assert len(losses(tmp_path / "w")) == 12
    line = r"process 0: the order or the hosts of the devices: \d+ of process 1 is new"
    assert re.search(line, outputs[0]) and "compiled ahead: traced" not in outputs[0]
