"""tools/compile_for_topology.py: table, JSON and compiled text of a small step; refusals."""

import json
from pathlib import Path

import pytest

from flaxpretrain.config import Mesh
from flaxpretrain.errors import UserError

CONFIGS = Path(__file__).parent.parent.parent / "configs"
RECIPE = str(CONFIGS / "bert_tiny.py")

SMALL = (
    "--set=model.vocab_size=300",
    "--set=model.hidden_size=32",
    "--set=model.num_hidden_layers=2",
    "--set=model.intermediate_size=64",
    "--set=attention=xla",
)


@pytest.mark.tpu
def test_a_step_on_two_slices_as_json_with_its_text_kept(tool, capsys, tmp_path):
    pytest.importorskip("libtpu")
    text = tmp_path / "step.hlo"
    arguments = [RECIPE, *SMALL, "--topology=v5e:2x2", "--slices=2", "--mesh=data=2,fsdp=-1"]
    sizes = ["--set=length=32", "--set=batch_size=16"]
    assert tool("compile_for_topology").main([*arguments, *sizes, "--json", f"--hlo={text}"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["fits"] and report["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert report["chips"] == 8 and report["tokens_per_step_per_chip"] == 64
    assert "fits" in err and "ESTIMATE" in err
    assert text.read_text().startswith("HloModule")


@pytest.mark.tpu
def test_a_search_prints_commands_keeps_what_it_found_and_goes_on(tool, capsys, tmp_path):
    pytest.importorskip("libtpu")
    record = tmp_path / "found" / "record.jsonl"
    flags = [*SMALL, "--set=length=32", "--topology=v5e:2x2", "--search", f"--record={record}"]
    meshes = "data=-1;data=-1,shard_optimizer=true"
    grid = ["--batch-sizes=16,32", "--remats=save_all", f"--meshes={meshes}"]
    search = [RECIPE, *flags, *grid, "--json"]
    assert tool("compile_for_topology").main([*search, "--max-compiles=1"]) == 0
    out, err = capsys.readouterr()
    assert "[2/4]" in err and err.count("left for the next search") == 3
    assert len(out.splitlines()) == 1
    with record.open("a") as file:
        file.write('{"key": "cut o')  # a kill in the middle of a line
    assert tool("compile_for_topology").main([*search, "--max-compiles=1"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 2 and all(each["fits"] for each in found)
    speeds = [each["estimated_tokens_per_second_per_chip"] for each in found]
    assert speeds == sorted(speeds, reverse=True)
    assert f"python run_pretraining.py {RECIPE} --set model.vocab_size=300" in found[0]["command"]
    assert "--set mesh.data=4 " in found[0]["command"]
    split = next(each for each in found if "mesh.shard_optimizer=true" in each["command"])
    whole = next(each for each in found if "mesh.shard_optimizer=false" in each["command"])
    # The gradients are reduce-scattered, and a device keeps a part of the optimizer's state.
    assert whole["collective_bytes"].keys() == {"all-reduce"}
    assert {"reduce-scatter", "all-gather"} <= split["collective_bytes"].keys()
    assert split["optimizer_bytes"] < 0.5 * whole["optimizer_bytes"]
    assert split["parameter_bytes"] == whole["parameter_bytes"]


def test_the_mesh_is_read(tool):
    mesh_of = tool("compile_for_topology").mesh_of
    assert mesh_of("data=4, tensor=2") == Mesh(data=4, fsdp=1, tensor=2)
    assert mesh_of("fsdp=-1,shard_optimizer=true") == Mesh(data=1, fsdp=-1, shard_optimizer=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v9:2x2"], "topology 'v9:2x2' does not exist"),
        (["--topology=v5e:2x2", "--mesh=data"], "--mesh data: expected AXIS=N"),
        (["--topology=v5e:2x2", "--mesh=rows=4"], "no field 'rows'"),
        (["--topology=v5e:2x2", "--phase=3"], "--phase 3: the recipe has phases 0 to 0"),
        (["--topology=v5e:2x2", "--slices=0"], "--slices 0"),
        (["--topology=v5e:2x2", "--mesh=data=3"], "mesh data=3, .* does not fit 4 devices"),
        (["--topology=v5e:2x2", "--mesh=tensor=4"], "its 2 heads are not divisible by mesh tensor"),
        (
            ["--topology=v5e:2x2", "--mesh=context=4", "--set=length=126"],
            "segment_ids of 126 positions are not divisible by mesh context = 4",
        ),
        (["--topology=v5e:2x2", "--search", "--remats=some"], "--remats: expected some of auto,"),
        (["--topology=v5e:2x2", "--search", "--batch-sizes=many"], "--batch-sizes many: expected"),
    ],
)
def test_mistakes_are_refused_in_one_line(tool, flags, message):
    pytest.importorskip("libtpu")
    with pytest.raises(UserError, match=message):
        tool("compile_for_topology").main([RECIPE, *flags])
