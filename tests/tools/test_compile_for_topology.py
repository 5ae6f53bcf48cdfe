"""tools/compile_for_topology.py: table, JSON and compiled text of a small step; refusals."""

import json
from pathlib import Path

import pytest

from flaxpretrain.config import Mesh
from flaxpretrain.errors import UserError
from tests import toys

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


def test_the_mesh_is_read(tool):
    run = tool("compile_for_topology").with_mesh(toys.run(), "data=4, tensor=2")
    assert run.mesh == Mesh(data=4, fsdp=1, tensor=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v9:2x2"], "topology 'v9:2x2' does not exist"),
        (["--topology=v5e:2x2", "--mesh=data"], "--mesh data: expected AXIS=N"),
        (["--topology=v5e:2x2", "--mesh=rows=4"], "no field 'rows'"),
        (["--topology=v5e:2x2", "--phase=3"], "--phase 3: the recipe has phases 0 to 0"),
        (["--topology=v5e:2x2", "--slices=0"], "--slices 0"),
    ],
)
def test_mistakes_are_refused_in_one_line(tool, flags, message):
    pytest.importorskip("libtpu")
    with pytest.raises(UserError, match=message):
        tool("compile_for_topology").main([RECIPE, *flags])
