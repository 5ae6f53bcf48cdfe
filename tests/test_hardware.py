"""Every device kind that jax is known to report finds its own peak, and no other."""

import pytest

from flaxpretrain.errors import UserError
from flaxpretrain.hardware import (
    PEAKS,
    HardwareRule,
    has_flash_attention,
    peak_of,
    rule_for,
)


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("TPU v2", "TPU v2 core"),
        ("TPU v3", "TPU v3 core"),
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5e", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("TPU v6e", "TPU v6e"),
        ("TPU7x", "TPU7x core"),
        ("NVIDIA GB200", "B200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("Tesla V100-SXM2-16GB", "V100 (float16)"),
        ("Tesla T4", "T4 (float16)"),
    ],
)
def test_a_device_kind_has_its_peak(device_kind, name):
    peak = peak_of(device_kind)
    assert peak is not None and peak.name == name


@pytest.mark.parametrize(
    "device_kind", ["cpu", "TPU v4 lite", "NVIDIA L40", "NVIDIA A30", "AMD Instinct MI300X"]
)
def test_an_unknown_kind_has_none_rather_than_a_relative_s(device_kind):
    assert peak_of(device_kind) is None


@pytest.mark.parametrize(
    ("device_kind", "matmul", "tera"),
    [
        ("TPU v5 lite", "default", 197),
        ("TPU v5 lite", "int8", 393),
        ("TPU v5p", "int8", 918),
        ("TPU v6 lite", "int8", 1836),
        ("TPU7x", "fp8", 2307),
        ("NVIDIA H200", "fp8", 1979),
        # A third of the FLOPs are the forward pass's: 1 / (1/3 / 393 + 2/3 / 197).
        ("TPU v5 lite", "int8_forward", 236.28),
    ],
)
def test_the_peak_of_a_step_is_that_of_the_numbers_it_multiplies(device_kind, matmul, tera):
    assert peak_of(device_kind).of_step(matmul) == pytest.approx(tera * 1e12, rel=1e-4)


@pytest.mark.parametrize(
    ("device_kind", "matmul", "message"),
    [
        ("TPU v5 lite", "fp8", "no peak of TPU v5e is stated for fp8: set it to int8 or default"),
        ("TPU v3", "int8_forward", "TPU v3 core is stated for int8_forward: set it to default"),
        ("TPU7x", "int8", "TPU7x core is stated for int8: set it to fp8 or default"),
    ],
)
def test_a_device_without_units_for_a_format_is_one_clear_line(device_kind, matmul, message):
    with pytest.raises(UserError, match=message) as error:
        peak_of(device_kind).of_step(matmul)
    assert "\n" not in str(error.value)


def test_narrower_numbers_are_never_slower():
    for _, peak in PEAKS:
        for fast in (peak.int8, peak.fp8):
            assert fast is None or fast >= peak.flops_per_second


RULES = (
    HardwareRule("TPU v5 lite", {"remat": "none"}, devices=(16, None)),
    HardwareRule("TPU v5 lite", {"remat": "dots", "microbatches": 4}),
    HardwareRule("h100", {"remat": "none"}, devices=(1, 8)),
)


@pytest.mark.parametrize(
    ("device_kind", "devices", "index"),
    [
        ("TPU v5 lite", 256, 0),
        ("TPU v5 lite", 4, 1),
        ("NVIDIA H100 80GB HBM3", 8, 2),
        ("NVIDIA H100 80GB HBM3", 16, None),
        ("cpu", 1, None),
    ],
)
def test_the_first_rule_that_fits_kind_and_number_counts(device_kind, devices, index):
    expected = None if index is None else RULES[index]
    assert rule_for(RULES, device_kind, devices) is expected


def test_a_rule_is_shown_with_what_it_sets():
    assert str(RULES[1]) == "hardware rule 'TPU v5 lite': remat = dots, microbatches = 4"
    limited = HardwareRule("H100", tokens_per_device=8192)
    assert str(limited) == "hardware rule 'H100': at most 8,192 tokens a device at once"


@pytest.mark.parametrize(
    ("rows", "length", "parts"),
    [(16, 512, 1), (17, 512, 17), (64, 512, 4), (64, 128, 1), (30, 1024, 5), (8, 16_384, 8)],
)
def test_rows_go_in_as_few_parts_as_memory_allows(rows, length, parts):
    assert HardwareRule("H100", tokens_per_device=8192).microbatches(rows, length) == parts


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("H100(", {}, "hardware.kind 'H100\\(' is no regular expression"),
        (
            "H100",
            {"optimizer.learning_rate": 1.0},
            "cannot set 'optimizer.learning_rate': rules say",
        ),
        ("H100", {"phases.0.batch_size": 8}, "cannot set 'phases.0.batch_size'"),
    ],
)
def test_a_rule_that_changes_what_is_learnt_is_refused(kind, settings, message):
    with pytest.raises(UserError, match=message):
        HardwareRule(kind, settings)


@pytest.mark.parametrize(
    ("device_kind", "has"),
    [
        ("Tesla V100-SXM2-16GB", False),
        ("Tesla T4", False),
        ("Tesla P100-PCIE-16GB", False),
        ("NVIDIA GeForce RTX 2080 Ti", False),
        ("NVIDIA A100-SXM4-40GB", True),
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA L4", True),
        ("NVIDIA GeForce RTX 3090", True),
    ],
)
def test_flash_attention_begins_with_ampere(device_kind, has):
    assert has_flash_attention(device_kind) == has
