"""Measuring speed: windows and medians, rates by formula, and a phase measured end to end."""

import jax
import numpy as np
import pytest

from flaxpretrain.analysis import throughput
from flaxpretrain.config import Phase
from flaxpretrain.data.store import open_dataset
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble
from flaxpretrain.training.session import open_pipeline
from tests import toys


def test_windows_leave_the_warm_up_out(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    calls = []

    def run(count):
        calls.append(count)
        # The first call, which warms up, is slow.
        clock[0] += count * (10.0 if len(calls) == 1 else 0.5)

    assert throughput.windows(run, 20) == [0.5] * 5
    assert calls == [throughput.WARM_UP, 4, 4, 4, 4, 4]


def test_few_steps_make_few_windows():
    calls = []
    assert len(throughput.windows(calls.append, 3)) == 3
    assert calls == [throughput.WARM_UP, 1, 1, 1]


def test_a_rate_is_that_of_the_median_window():
    found = throughput.rate([0.5, 0.4, 9.0], tokens=1000, devices=4, flops=8e12, peak=100e12)
    assert found.step_seconds == 0.5
    assert (found.slowest_step_seconds, found.fastest_step_seconds) == (9.0, 0.4)
    assert found.tokens_per_second == 2000 and found.tokens_per_second_per_device == 500
    # 8 TFLOP in half a second on four devices: 4 TFLOP/s each, 4 % of the peak.
    assert found.teraflops_per_second_per_device == 4.0
    np.testing.assert_allclose(found.mfu, 0.04)


def test_without_a_peak_there_is_no_mfu():
    found = throughput.rate([1.0], tokens=1, devices=1, flops=1e9, peak=None)
    assert found.mfu is None and found.teraflops_per_second_per_device == 1e-3


def test_padding_is_no_token():
    batch = {
        "segment_ids": np.array([[1, 1, 2, 0], [0, 0, 0, 0]]),
        "input_ids": np.ones((2, 4), int),
    }
    assert throughput.real_tokens(batch) == 3


def test_the_synthetic_dataset_is_a_whole_one(tmp_path):
    throughput.synthetic_dataset(tmp_path, toys.VOCABULARY, tokens=1200)
    dataset = open_dataset(tmp_path)
    dataset.verify()
    split = dataset.split("train")
    assert (split.tokens, split.documents) == (1500, 3)
    assert np.diff(split.sentence_offsets).tolist() == [25] * 60
    ids, _ = split.gather(np.array([0]), np.array([1500]), 1500)
    assert not np.isin(ids, toys.VOCABULARY.special_ids).any()


@pytest.mark.parametrize("axes", [(1, 1, 1), (4, 2, 1)])
def test_a_phase_is_measured_end_to_end(tmp_path, axes):
    phase = Phase(steps=30, length=32, batch_size=16)
    run = toys.run(phases=(phase,))
    throughput.synthetic_dataset(tmp_path, toys.VOCABULARY, tokens=4000)
    dataset = open_dataset(tmp_path)
    devices = jax.devices()[: int(np.prod(axes))]
    mesh = sharding.make_mesh(*axes, devices=devices)
    with jax.set_mesh(mesh):
        assembly = assemble(run, mesh, 30)
        pipeline = open_pipeline(run, dataset, (phase,))
        figures = throughput.measure(assembly, 0, phase, toys.VOCABULARY, pipeline, steps=5)
    assert figures.tokens_per_step == 16 * 32 and figures.compile_seconds > 0
    for rate in (figures.step, figures.loader, figures.both):
        assert rate.fastest_step_seconds <= rate.step_seconds <= rate.slowest_step_seconds
        np.testing.assert_allclose(
            rate.tokens_per_second_per_device, rate.tokens_per_second / len(devices)
        )
    assert figures.loader.teraflops_per_second_per_device is None
    assert figures.step.mfu is None  # no peak is known of a CPU
    assert figures.peak_memory_of == "process" and figures.peak_memory_bytes > 2**20
