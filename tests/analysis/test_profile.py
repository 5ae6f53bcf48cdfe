"""The table of a trace: made by hand for a GPU and a TPU, and of a real run on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from jax.profiler import ProfileData

from flaxpretrain.analysis.profile import PARTS, Instruction, part_of, step_times
from flaxpretrain.errors import UserError
from flaxpretrain.training.loop import train
from tests import toys

ROOT = Path(__file__).parent.parent.parent
MICROSECOND = 1_000_000  # in picoseconds


def trace(folder, planes, steps=1):
    """A trace of planes: name -> lines of (kernel, begin, end) in microseconds."""
    host = [("train", 10 * n, 10 * n + 1) for n in range(steps)]
    text = ""
    for plane, lines in ({"/host:CPU": {"python": host}} | planes).items():
        names = sorted({event[0] for events in lines.values() for event in events})
        text += f'planes {{ name: "{plane}" '
        text += 'stat_metadata { key: 1 value { id: 1 name: "step_num" } } '
        for number, name in enumerate(names, 1):
            text += f"event_metadata {{ key: {number} value "
            text += f"{{ id: {number} name: {json.dumps(name)} }} }} "
        for line, events in lines.items():
            text += f'lines {{ name: "{line}" '
            for place, (name, begin, end) in enumerate(events):
                text += (
                    f"events {{ metadata_id: {names.index(name) + 1} "
                    f"offset_ps: {begin * MICROSECOND} duration_ps: {(end - begin) * MICROSECOND} "
                )
                if plane == "/host:CPU":
                    text += f"stats {{ metadata_id: 1 int64_value: {place} }} "
                text += "} "
            text += "} "
        text += "} "
    folder.mkdir(parents=True, exist_ok=True)
    content = ProfileData.text_proto_to_serialized_xspace(text)
    (folder / "host.xplane.pb").write_bytes(content)
    return folder


COMPUTE = [
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", 0, 10),
    ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN", 10, 25),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x128x64", 25, 30),
    ("loop_add_fusion_12", 40, 50),
]
NCCL = [("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage)", 5, 45)]


def test_every_instant_of_a_gpu_goes_to_one_part_and_hidden_communication_to_none(tmp_path):
    planes = {"/device:GPU:0": {"Stream #1(Compute)": COMPUTE, "Stream #2(MemcpyD2D)": NCCL}}
    (times,) = step_times(trace(tmp_path, planes))
    assert times.device == "GPU:0" and times.steps == 1
    assert times.milliseconds == pytest.approx(0.05)
    spent = {name: round(ms * 1000, 6) for name, ms in times.by_part.items()}
    assert spent == {
        "attention": 10,
        "matmul": 20,
        "elementwise": 10,
        "collectives": 10,
        "idle": 0,
    }
    assert times.busy["collectives"] == pytest.approx(0.04)
    assert times.longest[0][0].startswith("nccl")


def test_time_is_that_of_one_step_and_gaps_are_idle(tmp_path):
    planes = {f"/device:GPU:{n}": {"Stream #1": COMPUTE} for n in range(2)}
    found = step_times(trace(tmp_path, planes, steps=5))
    assert [times.device for times in found] == ["GPU:0", "GPU:1"]
    assert found[0].milliseconds == pytest.approx(0.01)
    assert found[0].by_part["idle"] == pytest.approx(0.002)
    assert sum(found[0].by_part.values()) == pytest.approx(found[0].milliseconds)
    assert "idle" in "\n".join(found[0].lines()) and "20.0%" in "\n".join(found[0].lines())


def test_a_tpu_is_read_by_its_operations(tmp_path):
    operations = [
        ("%fusion.3 = bf16[8,128]{1,0} fusion(%p)", 0, 10),
        ("%all-reduce.1 = f32[8]{0} all-reduce(%fusion.3)", 10, 16),
        ("%splash_mha_fwd = bf16[8,128]{1,0} custom-call(%p)", 20, 30),
    ]
    planes = {"/device:TPU:0": {"XLA Ops": operations, "Steps": [("0", 0, 30)]}}
    (times,) = step_times(trace(tmp_path, planes))
    spent = {name: round(ms * 1000, 6) for name, ms in times.by_part.items()}
    assert spent == {"elementwise": 10, "collectives": 6, "attention": 10, "idle": 4}


@pytest.mark.parametrize(
    "opcodes, target, origin, expected",
    [
        ({"dot"}, "", "jit(train_step)/jvp()/while/body/dot_general Dense.__call__", "matmul"),
        ({"dot"}, "", "jit(f)/jvp()/dot_general context attend Attention.__call__", "attention"),
        ({"dot"}, "", "jit(f)/jvp()/dot_general vocabulary_logits Bert.logits", "head"),
        ({"multiply"}, "", "jit(f)/transpose(jvp())/mul log_likelihood cross_entropy", "head"),
        ({"dot", "add"}, "", "jit(train_step)/optimizer/dot_general update", "optimizer"),
        ({"custom-call"}, "__cublas$lt$matmul", "jit(f)/jvp()/dot_general", "matmul"),
        ({"custom-call"}, "__cudnn$fmhaSoftmax", "jit(f)/jvp()/custom-call", "attention"),
        ({"all-reduce-start"}, "", "jit(f)/psum", "collectives"),
        ({"tanh"}, "", "jit(f)/jvp()/tanh Dense.__call__ attending", "elementwise"),
        ({"while"}, "", "jit(f)/while", None),
    ],
)  # fmt: skip
def test_the_part_of_an_instruction(opcodes, target, origin, expected):
    assert part_of("fusion_1", Instruction(frozenset(opcodes), target, origin)) == expected


def test_a_folder_without_a_trace_and_a_broken_one_are_told(tmp_path):
    with pytest.raises(UserError, match="holds no trace"):
        step_times(tmp_path)
    (tmp_path / "x.xplane.pb").write_bytes(b"\x0a\xff\xff\xff")
    with pytest.raises(UserError, match="x.xplane.pb is no trace, or damaged"):
        step_times(tmp_path)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A workdir; in a process of its own, for the profiler crashes one that has loaded libtpu."""
    folder = tmp_path_factory.mktemp("traced")
    data = str(toys.dataset(folder / "data"))
    recipe = folder / "toy_recipe.py"
    recipe.write_text(
        f"from tests import toys\ndef recipe():\n    return toys.packed_run({data!r}, steps=5)\n"
    )
    command = [sys.executable, "run_pretraining.py", recipe, "--workdir", folder / "run"]
    done = subprocess.run(
        [*command, "--quiet", "--profile-steps", "3:5"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_run_traces_its_steps_where_tensorboard_looks_for_them(traced):
    (found,) = (traced / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb")
    times = step_times(traced)
    assert {t.steps for t in times} == {2}
    for each in times:
        assert sum(each.by_part.values()) == pytest.approx(each.milliseconds)
        for name in set(PARTS) - {"collectives"}:
            assert each.by_part[name] > 0, name


def test_the_program_prints_the_table(traced):
    program = [sys.executable, ROOT / "tools" / "profile_table.py", traced]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in PARTS) and "ms a step" in done.stdout


def test_steps_that_a_run_does_not_have_are_told(tmp_path):
    run = toys.packed_run(str(toys.dataset(tmp_path / "data")), steps=5)
    with pytest.raises(UserError, match="--profile-steps 10:13: the run ends with step 5"):
        train(run, tmp_path / "run", quiet=True, profile_steps=range(10, 13))
