"""The doctor names what is wrong, and what to do about it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flaxpretrain.analysis import doctor
from flaxpretrain.analysis.doctor import GOOD, GOOGLE, NVIDIA, WARNING, WRONG

ROOT = Path(__file__).parent.parent.parent


def answering(platform="cpu", kind="cpu", apart=0.0):
    answer = {"platform": platform, "kind": kind, "count": 4, "apart": apart}
    return f"print({json.dumps(json.dumps(answer))})"


def only(findings):
    (finding,) = findings
    return finding


def test_packages_that_are_missing_or_too_old_are_named_together():
    found = only(doctor.packages(["numpy>=1", "numpy<1", "no-such-package>=2", "pytest>=1"]))
    assert found.verdict == WRONG
    assert "no-such-package is missing" in found.seen and "is not <1" in found.seen
    assert only(doctor.packages(["numpy>=1", 'no-such-package; extra == "tpu"'])).verdict == GOOD


def test_devices_that_compute_rightly_are_good():
    found = only(doctor.devices(present=set(), probe=answering("tpu", "TPU v5e")))
    assert (found.verdict, found.seen) == (GOOD, "4 x TPU v5e (tpu)")


@pytest.mark.parametrize(("vendor", "extra"), [(GOOGLE, "tpu"), (NVIDIA, "cuda")])
def test_an_accelerator_that_jax_does_not_find_is_wrong(vendor, extra):
    found = only(doctor.devices(present={vendor}, held_by=[], probe=answering()))
    assert found.verdict == WRONG and found.remedy == f'pip install ".[{extra}]"'


def test_wrong_products_are_wrong():
    found = only(doctor.devices(present=set(), probe=answering(apart=0.5)))
    assert found.verdict == WRONG and "off by 0.5" in found.seen


def test_a_driver_that_hangs_is_given_up():
    found = only(doctor.devices(present=set(), seconds=0.5, probe="import time; time.sleep(60)"))
    assert found.verdict == WRONG and "no answer" in found.seen


def test_a_driver_that_fails_is_quoted():
    found = only(doctor.devices(present=set(), probe="raise RuntimeError('no such driver')"))
    assert found.verdict == WRONG and "no such driver" in found.seen


def test_the_process_that_holds_a_device_is_named(tmp_path):
    held = tmp_path / "accel0"
    held.touch()
    script = f"f = open({str(held)!r}); print('open', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        found = doctor.holders([str(tmp_path / "accel")])
        other.stdin.close()
    assert found == [other.pid]
    tpu, devices = doctor.devices(present={GOOGLE}, held_by=[7, 9], probe=answering("tpu", "TPU"))
    assert tpu.verdict == WRONG and "process 7, 9" in tpu.seen and devices.verdict == GOOD


def test_compiler_options_are_shown_and_those_that_are_not_known():
    answer = {"platform": "tpu", "kind": "TPU v4", "count": 4, "apart": 0.0}
    answer |= {"known": ["xla_one", "xla_two"], "unknown": ["xla_old"]}
    probe = f"print({json.dumps(json.dumps(answer))})"
    _, known, unknown = doctor.devices(present=set(), probe=probe)
    assert (known.verdict, known.seen) == (GOOD, "steps with xla_one, xla_two")
    assert unknown.verdict == WARNING and "does not know xla_old" in unknown.seen


def test_the_environment_s_flags_are_shown():
    found = only(doctor.flags({"LIBTPU_INIT_ARGS": "--xla_one=false", "XLA_FLAGS": ""}))
    assert (found.what, found.seen) == ("LIBTPU_INIT_ARGS", "--xla_one=false")


def test_little_disk_and_a_folder_that_cannot_be_written(tmp_path):
    assert only(doctor.disk(tmp_path / "not" / "yet", needed=1)).verdict == GOOD
    assert only(doctor.disk(tmp_path, needed=1e18)).verdict == WARNING
    if os.geteuid():
        tmp_path.chmod(0o500)
        assert only(doctor.disk(tmp_path)).verdict == WRONG


def test_little_memory_is_warned_of():
    assert only(doctor.memory(1e9)).verdict == WARNING
    assert only(doctor.memory(64e9)).verdict == GOOD


def test_the_program_on_this_machine():
    done = subprocess.run(
        [sys.executable, "tools/doctor.py", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    findings = {one["what"]: one for one in json.loads(done.stdout)["findings"]}
    assert findings["devices"]["verdict"] == GOOD, done.stderr
    assert findings["Python"]["verdict"] == GOOD
    wrong = any(one["verdict"] == WRONG for one in findings.values())
    assert done.returncode == (2 if wrong else 0)
