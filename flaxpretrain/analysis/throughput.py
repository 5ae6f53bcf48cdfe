"""How fast a run trains here: the step alone, the loader alone, and both together.

Every rate is a median over windows of steps, after steps that warm up; the device is waited for at
the end of a window, never inside it.
"""

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxpretrain.config import Phase
from flaxpretrain.data.pipeline import Batches
from flaxpretrain.data.store_writer import SplitWriter, id_type, write_metadata
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import Assembly, framing_of, random_batch
from flaxpretrain.training.compiler_options import compiler_options
from flaxpretrain.training.programs import give_back_memory

FORMULA = (
    "MFU = formula FLOPs of a step / (step seconds * devices * peak FLOP/s); the formula counts "
    "the matrix products of forward and backward pass, the vocabulary at masked slots only, and "
    "no recomputation; with precision.matmul in 8 bits the peak is that of 8 bits, as if all "
    "products were"
)

WINDOWS = 5
"""Windows a measurement is cut into; each rate is their median."""

WARM_UP = 2
"""Steps before the first window."""


@dataclasses.dataclass(frozen=True)
class Rate:
    """Speed of one measurement; `slowest` and `fastest` are those of single windows."""

    step_seconds: float
    slowest_step_seconds: float
    fastest_step_seconds: float
    tokens_per_second: float
    tokens_per_second_per_device: float
    teraflops_per_second_per_device: float | None = None
    mfu: float | None = None


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a benchmark of one phase found."""

    phase: int
    length: int
    batch_size: int
    microbatches: int
    tokens_per_step: int
    formula_flops: float
    compile_seconds: float
    step: Rate
    loader: Rate
    both: Rate
    peak_memory_bytes: int
    peak_memory_of: str


def windows(run: Callable[[int], None], steps: int) -> list[float]:
    """Seconds a step of each window; `run(n)` does n steps and waits for them to end."""
    run(WARM_UP)
    size = max(1, steps // WINDOWS)
    seconds = []
    for _ in range(min(WINDOWS, steps)):
        started = time.perf_counter()
        run(size)
        seconds.append((time.perf_counter() - started) / size)
    return seconds


def rate(
    seconds: list[float], tokens: float, devices: int, flops: float | None, peak: float | None
) -> Rate:
    """The speed that windows stand for; `tokens` and `flops` are of a step on all devices."""
    step = float(np.median(seconds))
    achieved = None if flops is None else flops / step / devices
    return Rate(
        step_seconds=step,
        slowest_step_seconds=max(seconds),
        fastest_step_seconds=min(seconds),
        tokens_per_second=tokens / step,
        tokens_per_second_per_device=tokens / step / devices,
        teraflops_per_second_per_device=None if achieved is None else achieved / 1e12,
        mfu=None if achieved is None or peak is None else achieved / peak,
    )


class Bench:
    """One phase of a run, compiled, with its state on the devices."""

    def __init__(
        self,
        assembly: Assembly,
        phase: Phase,
        vocabulary: Vocabulary,
        pipeline: Batches,
    ) -> None:
        """Compiles the step, which `compile_seconds` tells the time of; `pipeline` feeds it."""
        self._assembly, self._phase, self._pipeline = assembly, phase, pipeline
        self.devices = int(np.size(assembly.mesh.devices))
        self.flops = assembly.flops_per_step(phase, vocabulary)
        self._peak = assembly.peak_flops_per_second
        spec = assembly.batch_spec(phase, vocabulary)
        framing = framing_of(assembly.run, vocabulary, phase.length)
        synthetic = random_batch(spec, framing)
        self._resident = sharding.to_device(synthetic, assembly.mesh, phase.batch_size)
        self.tokens = real_tokens(synthetic)
        started = time.perf_counter()
        options = compiler_options(assembly.mesh)
        self._step = assembly.train_step(phase, options).lower(assembly.state, spec).compile()
        self.compile_seconds = time.perf_counter() - started
        give_back_memory()
        self._state = assembly.initial_state()

    def step_alone(self, steps: int) -> Rate:
        """The train step on one batch that lies on the devices."""

        def run(count: int) -> None:
            metrics = None
            for _ in range(count):
                self._state, metrics = self._step(self._state, self._resident)
            jax.block_until_ready((self._state, metrics))

        return rate(windows(run, steps), self.tokens, self.devices, self.flops, self._peak)

    def steps(self, count: int) -> None:
        """Some steps on the batch that lies on the devices, waited for: what a profile looks at."""
        for _ in range(count):
            self._state, _ = self._step(self._state, self._resident)
        jax.block_until_ready(self._state)

    def loader_alone(self, steps: int) -> Rate:
        """Batches from the store, framed and noised, that nobody waits for."""
        tokens: list[int] = []
        batches = self._batches()

        def run(count: int) -> None:
            tokens.extend(real_tokens(next(batches)) for _ in range(count))

        seconds = windows(run, steps)
        batches.close()
        return rate(seconds, float(np.mean(tokens)), self.devices, None, None)

    def both(self, steps: int) -> Rate:
        """The train step fed by the loader, as a run does it."""
        tokens: list[int] = []
        batches = self._batches()

        def run(count: int) -> None:
            metrics = None
            for _ in range(count):
                batch = next(batches)
                tokens.append(real_tokens(batch))
                placed = sharding.to_device(batch, self._assembly.mesh, self._phase.batch_size)
                self._state, metrics = self._step(self._state, placed)
            jax.block_until_ready((self._state, metrics))

        seconds = windows(run, steps)
        batches.close()
        share = float(np.mean(tokens))
        return rate(seconds, share, self.devices, self.flops, self._peak)

    def _batches(self) -> Any:
        return self._pipeline.iterate(0, self._pipeline.steps)


def measure(
    assembly: Assembly,
    number: int,
    phase: Phase,
    vocabulary: Vocabulary,
    pipeline: Batches,
    steps: int,
) -> Figures:
    """All figures of one phase, whose number in the recipe is `number`."""
    bench = Bench(assembly, phase, vocabulary, pipeline)
    step, loader, both = bench.step_alone(steps), bench.loader_alone(steps), bench.both(steps)
    memory, of = peak_memory(assembly.mesh.devices.flatten().tolist())
    return Figures(
        phase=number,
        length=phase.length,
        batch_size=phase.batch_size,
        microbatches=phase.microbatches,
        tokens_per_step=bench.tokens,
        formula_flops=bench.flops,
        compile_seconds=bench.compile_seconds,
        step=step,
        loader=loader,
        both=both,
        peak_memory_bytes=memory,
        peak_memory_of=of,
    )


def real_tokens(batch: Mapping[str, np.ndarray]) -> int:
    """Input tokens of a batch that are no padding, as `Objective.tokens` counts them."""
    return sum(int(np.count_nonzero(v)) for n, v in batch.items() if n.endswith("segment_ids"))


def peak_memory(devices: list[Any]) -> tuple[int, str]:
    """The most bytes in use so far on one device, or by this process where devices do not tell."""
    stats = [device.memory_stats() for device in devices]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks), "device"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"


def synthetic_dataset(folder: Path, vocabulary: Vocabulary, tokens: int, seed: int = 0) -> None:
    """Writes a store of random text: sentences of 25 tokens, documents of 20 sentences."""
    generator = np.random.default_rng(seed)
    sentence, document = 25, 500
    documents = -(-tokens // document)
    regular = vocabulary.regular_ids()
    folder.mkdir(parents=True, exist_ok=True)
    writer = SplitWriter(folder, "train", id_type(vocabulary.size), shard_bytes=1 << 26)
    writer.append(
        regular[generator.integers(0, len(regular), documents * document)],
        np.ones(documents * document, bool),
        np.full(documents * document // sentence, sentence),
        np.full(documents, document),
        np.full(documents, document // sentence),
        np.zeros(documents, np.int64),
        np.zeros(documents, np.int64),
    )
    writer.close()
    entry: Mapping[str, Any] = writer.entry()
    write_metadata(folder, fingerprint="synthetic", vocabulary=vocabulary, splits={"train": entry})
