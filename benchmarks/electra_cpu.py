"""ELECTRA-small on two CPU threads, beside what the original reached on the same processor.

    python benchmarks/electra_cpu.py
    python benchmarks/electra_cpu.py --original ELECTRA --original-python PYTHON

electra_small with a vocabulary of 8,000 in float32, 16 rows of 128 a step, dropout on as in the
recipe, layers unrolled, which takes longer to compile and less time a step on CPUs (jax 0.12; with
0.10 XLA computes sums of residuals again in every layer after, and scanned layers are faster). Our
figure is that of the whole loop: rows from a store, masks, the transfer and the train step; peak
memory is that of the process, the compilation included.

ELECTRA is a checkout of google-research/electra (8a46635), PYTHON one that has TensorFlow 1.15.0:
Python 3.7 with `pip install tensorflow==1.15.0 protobuf==3.20.3 scipy scikit-learn`. The original
then trains with the same sizes on the same threads before and after ours, timed by the clock from
the 21st step on, and the ratio is to the mean of the two. Without it the ratio is to what it
reached once on two threads of an Intel Xeon with AMX, 10.91 sequences/s and 2.56 GB, which says
little of another processor.
Writes benchmarks/results/electra_cpu.json.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flaxpretrain import program
from flaxpretrain.errors import UserError

RESULT = ROOT / "benchmarks" / "results" / "electra_cpu.json"
LENGTH, ROWS, VOCABULARY, THREADS = 128, 16, 8000, 2
OVERRIDES = [
    f"model.vocab_size={VOCABULARY}",
    f"batch_size={ROWS}",
    f"length={LENGTH}",
    "precision.compute=float32",
    "scan_layers=false",
]
RECORDED = {
    "sequences_per_second": 10.91,
    "peak_memory_gb": 2.56,
    "processor": "Intel Xeon with AMX",
    "side_by_side": False,
}
"""Of google-research/electra, measured once; see above."""
TARGET_RATIO, TARGET_GB = 1.5, 2.0
ORIGINAL_WARM_UP = 20


def measured(overrides: list[str], steps: int):
    """The run and what `throughput.measure` finds of it, on as many threads as were chosen."""
    import jax

    from flaxpretrain.analysis import throughput
    from flaxpretrain.config import load
    from flaxpretrain.data.store import open_dataset
    from flaxpretrain.training import sharding
    from flaxpretrain.training.assembly import assemble, stand_in_vocabulary
    from flaxpretrain.training.session import open_pipeline

    run = load(ROOT / "configs" / "electra_small.py", overrides)
    mesh = sharding.make_mesh()
    needed = steps + throughput.WARM_UP + throughput.WINDOWS
    with tempfile.TemporaryDirectory() as name, jax.set_mesh(mesh):
        throughput.synthetic_dataset(Path(name), stand_in_vocabulary(run), 1 << 20)
        dataset = open_dataset(Path(name))
        phase = dataclasses.replace(run.phases[0], steps=needed)
        pipeline = open_pipeline(run, dataset, (phase,))
        assembly = assemble(run, mesh, total_steps=run.phases[0].steps or 1)
        return run, throughput.measure(assembly, 0, phase, dataset.vocabulary, pipeline, steps)


def main(argv: list[str]) -> None:
    """Measures and writes the result."""
    parser = program.Parser(__doc__)
    parser.add_argument("--steps", type=int, default=60, help="steps of a measurement")
    parser.add_overrides("change the recipe further")
    parser.add_argument("--original", type=Path, help="a checkout of google-research/electra")
    parser.add_argument("--original-python", type=Path, help="a Python with TensorFlow 1.15")
    parser.add_argument("--output", type=Path, default=RESULT, help="file of the result")
    arguments = parser.parse_args(argv)
    if (arguments.original is None) != (arguments.original_python is None):
        raise UserError("--original and --original-python come together")
    if hasattr(os, "sched_setaffinity"):  # XLA takes as many threads as it may run on
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    originals = []
    if arguments.original:
        originals.append(timed_original(arguments.original, arguments.original_python))
    run, figures = measured(OVERRIDES + arguments.overrides, arguments.steps)
    if arguments.original:
        originals.append(timed_original(arguments.original, arguments.original_python))
    original = mean_of(originals) if originals else RECORDED
    rate = ROWS / figures.both.step_seconds
    memory = figures.peak_memory_bytes / 1e9
    result = {
        "benchmark": "electra_cpu",
        "date": datetime.date.today().isoformat(),
        "recipe": "electra_small",
        "overrides": OVERRIDES + arguments.overrides,
        "dropout": [run.model.hidden_dropout_prob, run.model.attention_probs_dropout_prob],
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "processor": processor(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
        "steps": arguments.steps,
        "sequences_per_second": round(rate, 2),
        "sequences_per_second_slowest_window": round(ROWS / figures.both.slowest_step_seconds, 2),
        "sequences_per_second_step_alone": round(ROWS / figures.step.step_seconds, 2),
        "peak_memory_gb": round(memory, 3),
        "compile_seconds": round(figures.compile_seconds, 1),
        "formula_gflop_a_step": round(figures.formula_flops / 1e9, 1),
        "original": original,
        "ratio": round(rate / original["sequences_per_second"], 3),
    }
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    print(
        f"{rate:.2f} sequences/s and {memory:.2f} GB; the original "
        f"{original['sequences_per_second']} and {original['peak_memory_gb']}: ratio "
        f"{result['ratio']} (aim: {TARGET_RATIO} under {TARGET_GB} GB)",
        file=sys.stderr,
    )


def timed_original(folder: Path, python: Path) -> tuple[float, float]:
    """Sequences/s and peak gigabytes of the original's own programs on a corpus of random words."""
    size = {"model_size": "small", "vocab_size": VOCABULARY, "max_seq_length": LENGTH}
    steps = {"train_batch_size": ROWS, "num_train_steps": ORIGINAL_WARM_UP + 60}
    rarely = {"iterations_per_loop": 10, "save_checkpoints_steps": 1_000_000}
    # Our flags are for a newer XLA, which TensorFlow 1.15 would stop at.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    with tempfile.TemporaryDirectory() as name:
        write_corpus(Path(name))
        build = (
            f"--corpus-dir={name}/corpus --vocab-file={name}/vocab.txt --num-processes={THREADS}"
        )
        build += f" --output-dir={name}/pretrain_tfrecords --max-seq-length={LENGTH}"
        subprocess.run(
            [python.absolute(), "build_pretraining_dataset.py", *build.split()],
            cwd=folder,
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        hparams = json.dumps(size | steps | rarely)
        train = f"run_pretraining.py --data-dir={name} --model-name=timed --hparams"
        process = subprocess.Popen(
            [python.absolute(), "-u", *train.split(), hparams],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        moments, said = {}, []
        for line in process.stdout:
            said.append(line)
            if step := re.match(rf"(\d+)/{steps['num_train_steps']} = ", line):
                moments.setdefault(int(step.group(1)), time.monotonic())
        _, status, usage = os.wait4(process.pid, 0)
    if status or max(moments, default=0) <= ORIGINAL_WARM_UP:
        raise UserError(f"{folder} did not train: {''.join(said[-3:]).strip()}")
    seconds = moments[max(moments)] - moments[ORIGINAL_WARM_UP]
    rate = ROWS * (max(moments) - ORIGINAL_WARM_UP) / seconds
    return rate, usage.ru_maxrss * 1024 / 1e9


def write_corpus(folder: Path) -> None:
    """A vocabulary of words and 2,000 documents of some hundreds of them."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [f"word{number}" for number in range(VOCABULARY - len(special))]
    (folder / "vocab.txt").write_text("\n".join([*special, *words]) + "\n", encoding="utf-8")
    (folder / "corpus").mkdir()
    draw = random.Random(0)
    for part in range(8):
        documents = (
            "\n".join(" ".join(draw.choices(words, k=25)) for _ in range(16)) for _ in range(250)
        )
        (folder / "corpus" / f"{part}.txt").write_text("\n\n".join(documents), encoding="utf-8")


def mean_of(originals: list[tuple[float, float]]) -> dict:
    """The original's figures of this run."""
    return {
        "sequences_per_second": round(statistics.mean(rate for rate, _ in originals), 2),
        "peak_memory_gb": round(max(memory for _, memory in originals), 2),
        "each": [round(rate, 2) for rate, _ in originals],
        "processor": processor(),
        "side_by_side": True,
    }


def processor() -> str:
    """The processor's name, as Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


if __name__ == "__main__":
    program.use_huge_pages()
    program.run(main)
