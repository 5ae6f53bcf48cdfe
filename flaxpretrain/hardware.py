"""What is known of device kinds: what each can do at best, and a run's settings for it.

The peak is the denominator of model FLOPs utilisation (MFU).
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flaxpretrain.errors import UserError

MATMULS = ("default", "int8", "int8_forward", "fp8", "fp8_forward")
"""What `precision.matmul` may say of the matrix products of layers with their parameters.

`default` computes them as all else, in `precision.compute`; the others in numbers of 8 bits, in
forward and backward pass or in the forward pass alone.
"""


@dataclasses.dataclass(frozen=True)
class Peak:
    """Dense matmul peaks in operations a second, and memory, of one device as jax counts devices.

    `flops_per_second` is that of bfloat16; `int8` and `fp8` are None where the maker states none.
    """

    name: str
    flops_per_second: float
    memory_bytes: float
    _: dataclasses.KW_ONLY
    int8: float | None = None
    fp8: float | None = None

    def of_step(self, matmul: str) -> float:
        """The peak of a step whose matrix products are computed in one of `MATMULS`.

        As if all of them were, attention and the heads too, so that MFU flatters no run. Of a step
        with 8 bits in the forward pass alone it is what a third of its FLOPs at the one peak and
        two thirds at the other come to.

        Raises:
            UserError: the device has no units for such numbers.
        """
        if matmul == "default":
            return self.flops_per_second
        kind, _, forward_alone = matmul.partition("_")
        fast = {"int8": self.int8, "fp8": self.fp8}[kind]
        if fast is None:
            others = [name for name in ("int8", "fp8") if getattr(self, name) and name != kind]
            raise UserError(
                f"precision.matmul: no peak of {self.name} is stated for {matmul}: set it to "
                f"{' or '.join([*others, 'default'])}"
            )
        return 3.0 / (1.0 / fast + 2.0 / self.flops_per_second) if forward_alone else fast


_GIB = 2.0**30

PEAKS: tuple[tuple[str, Peak], ...] = (
    # Cloud TPU system architecture pages; chip figures, which for v2 and v3 are two jax devices.
    # fp8: the page of TPU7x, which compares three generations; int8 of v5p: its announcement.
    (r"TPU v2", Peak("TPU v2 core", 22.5e12, 8 * _GIB)),
    (r"TPU v3", Peak("TPU v3 core", 61.5e12, 16 * _GIB)),
    (r"TPU v4$", Peak("TPU v4", 275e12, 32 * _GIB, int8=275e12)),
    (r"TPU v5 ?lite|TPU v5e", Peak("TPU v5e", 197e12, 16 * _GIB, int8=393e12)),
    (r"TPU v5p?$", Peak("TPU v5p", 459e12, 95 * _GIB, int8=918e12, fp8=459e12)),
    (r"TPU v6 ?lite|TPU v6e", Peak("TPU v6e", 918e12, 32 * _GIB, int8=1836e12, fp8=918e12)),
    # One Ironwood chip shows as two devices.
    (r"TPU ?v?7x?", Peak("TPU7x core", 1153.5e12, 96 * _GIB, fp8=2307e12)),
    # NVIDIA data sheets, without sparsity, SXM where there is a choice.
    (r"GB200|B200", Peak("B200", 2250e12, 180 * _GIB, int8=4500e12, fp8=4500e12)),
    (r"GH200", Peak("GH200", 989e12, 96e9, int8=1979e12, fp8=1979e12)),
    (r"H200", Peak("H200", 989e12, 141e9, int8=1979e12, fp8=1979e12)),
    (r"H100.*PCIe", Peak("H100 PCIe", 756e12, 80e9, int8=1513e12, fp8=1513e12)),
    (r"H100 NVL", Peak("H100 NVL", 835e12, 94e9, int8=1671e12, fp8=1671e12)),
    (r"H100", Peak("H100", 989e12, 80e9, int8=1979e12, fp8=1979e12)),
    (r"A100", Peak("A100", 312e12, 80e9, int8=624e12)),
    (r"A10G", Peak("A10G", 70e12, 24e9, int8=140e12)),
    (r"A10\b", Peak("A10", 125e12, 24e9, int8=250e12)),
    (r"L40S", Peak("L40S", 362e12, 48e9, int8=733e12, fp8=733e12)),
    (r"\bL4\b", Peak("L4", 121e12, 24e9, int8=242e12, fp8=242e12)),
    (r"RTX 4090", Peak("RTX 4090", 165e12, 24e9, int8=660e12, fp8=330e12)),
    (r"RTX 3090", Peak("RTX 3090", 71e12, 24e9, int8=284e12)),
    # No bfloat16 units: the float16 peak, for scale.
    (r"V100", Peak("V100 (float16)", 125e12, 32e9)),
    (r"\bT4\b", Peak("T4 (float16)", 65e12, 16e9, int8=130e12)),
)


def peak_of(device_kind: str) -> Peak | None:
    """The peak of a `jax.Device.device_kind`; None where none is known, as for CPUs."""
    for pattern, peak in PEAKS:
        if re.search(pattern, device_kind, re.IGNORECASE):
            return peak
    return None


_BETWEEN_STEPS: Mapping[str, bool] = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
}
"""Sums of gradients over `data` go beside other computation, from slice to slice above all."""

_FUSED_GATHERS: Mapping[str, bool] = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
"""Gathers of parameters (fsdp) are fused with the products beside them."""

_WHOLE_PRODUCTS: Mapping[str, int] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
"""Where the partitioner has the step (tensor, context), parameters in slices are gathered first.

XLA's own choice multiplies by each slice as it comes, in products narrower than a matrix unit: for
BERT-base on v5e:4x4, fsdp=4 and tensor=4, by its cost model 293 M cycles a step, with this 254 M.
"""

OVERLAP: tuple[tuple[str, Mapping[str, int]], ...] = (
    # AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py: DATA_PARALLEL_OVERLAP and
    # CF_FOR_ALL_GATHER; libtpu refuses the second group on all generations but v5e.
    (r"TPU v5 ?lite|TPU v5e", {**_BETWEEN_STEPS, **_FUSED_GATHERS, **_WHOLE_PRODUCTS}),
    (r"TPU v[4-9]|TPU ?7x", {**_BETWEEN_STEPS, **_WHOLE_PRODUCTS}),
    # docs.jax.dev/en/latest/gpu_performance_tips.html; NVIDIA's images of JAX set it too.
    (r"NVIDIA|Tesla|GeForce", {"xla_gpu_enable_latency_hiding_scheduler": True}),
)
"""Compiler options by which steps on several devices compute while they exchange."""


FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Of the environment: an option that is named there is the user's."""


def overlap_options(device_kind: str) -> dict[str, int]:
    """The compiler options for several devices of a kind; none for CPUs."""
    for pattern, options in OVERLAP:
        if re.search(pattern, device_kind):
            return dict(options)
    return {}


_RULED = re.compile(
    r"mesh\.\w+|precision\.\w+|remat|attention|scan_layers|(phases\.\d+\.)?microbatches"
)
"""Fields that a hardware rule may set: how a run computes, never what it learns from."""


@dataclasses.dataclass(frozen=True)
class HardwareRule:
    """What a run sets on devices of some kind.

    kind: regex that occurs in `jax.Device.device_kind`, case ignored: `TPU v5 lite`, `H100`.
    settings: field -> value, named as for --set.
    tokens_per_device: how many positions of a microbatch a device has memory for; each phase is
        then split into as few microbatches as that takes.
    devices: how many there must be, from the fewest to the most; None for no limit.
    """

    kind: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    _: dataclasses.KW_ONLY
    tokens_per_device: int | None = None
    devices: tuple[int, int | None] = (1, None)

    def __post_init__(self) -> None:
        """Raises UserError on a pattern that is none, and on fields that rules may not set."""
        try:
            re.compile(self.kind)
        except re.error as error:
            raise UserError(
                f"hardware.kind {self.kind!r} is no regular expression: {error}"
            ) from error
        if self.tokens_per_device is not None and self.tokens_per_device < 1:
            raise UserError(f"hardware rule {self.kind!r}: tokens_per_device must be positive")
        for name in self.settings:
            if not _RULED.fullmatch(name):
                raise UserError(
                    f"hardware rule {self.kind!r} cannot set {name!r}: rules say how a run "
                    "computes, with mesh.*, precision.*, remat, attention, scan_layers, "
                    "microbatches or phases.N.microbatches"
                )

    def fits(self, device_kind: str, devices: int) -> bool:
        """Whether it is meant for so many devices of this kind."""
        fewest, most = self.devices
        enough = fewest <= devices and (most is None or devices <= most)
        return enough and re.search(self.kind, device_kind, re.IGNORECASE) is not None

    def __str__(self) -> str:
        """As in `hardware rule 'H100': remat = none`."""
        values = [f"{name} = {value}" for name, value in self.settings.items()]
        if self.tokens_per_device is not None:
            values.append(f"at most {self.tokens_per_device:,} tokens a device at once")
        return f"hardware rule {self.kind!r}: {', '.join(values)}"

    def microbatches(self, rows: int, length: int) -> int:
        """Into how many parts a device's rows of a step go; as many as rows where none is small.

        Raises:
            ValueError: the rule says nothing about it.
        """
        if self.tokens_per_device is None:
            raise ValueError("no tokens_per_device")
        parts = (n for n in range(1, rows + 1) if rows % n == 0)
        return next((n for n in parts if rows // n * length <= self.tokens_per_device), rows)


def rule_for(rules: Sequence[HardwareRule], device_kind: str, devices: int) -> HardwareRule | None:
    """The first rule that fits; None where none does."""
    return next((rule for rule in rules if rule.fits(device_kind, devices)), None)


_BEFORE_AMPERE = r"[KMPV]100|\bP40?\b|\bT4\b|GTX|TITAN|RTX 20|Quadro RTX"


def has_flash_attention(device_kind: str) -> bool:
    """Whether cuDNN has a flash attention kernel for a GPU: it begins with Ampere."""
    return not re.search(_BEFORE_AMPERE, device_kind)
