"""Training on the CPU beside PyTorch Transformers: the same model, batch, precision and optimizer.

    python benchmarks/training_cpu.py

bert_small (12 layers of 256, rows of 128) in float32, 16 rows a step, hidden dropout as the recipe
has it and no attention dropout, on two threads each, with malloc asking for huge pages. Our side is
the whole train step, its layers unrolled as theirs are; theirs is what their Trainer does in a
step: forward with loss, backward, clipping, fused AdamW, schedule, gradients to None. The sides
take turns, in processes of their own, and each waits while the other runs. Prints a table, and
writes medians and their ratio to benchmarks/results/training_cpu.json, an entry for each jax.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULT = ROOT / "benchmarks" / "results" / "training_cpu.json"
LENGTH, ROWS, THREADS = 128, 16, 2
OVERRIDES = [
    f"batch_size={ROWS}",
    f"length={LENGTH}",
    "precision.compute=float32",
    "scan_layers=false",
]


def batch_of(run):
    """A batch of full rows of random ids, masked as the recipe says."""
    import numpy as np

    from flaxpretrain.training.assembly import stand_in_vocabulary

    vocabulary = stand_in_vocabulary(run)
    framing = run.objective.framing(vocabulary, LENGTH)
    generator = np.random.default_rng(0)
    regular = vocabulary.regular_ids()
    ids = regular[generator.integers(0, len(regular), (ROWS, framing.capacity))].astype(np.int32)
    rows = {
        "ids": ids,
        "word_starts": np.ones(ids.shape, bool),
        "piece_lengths": np.full((ROWS, 1), framing.capacity, np.int32),
    }
    return framing.examples(rows, generator.integers(0, 2**63, ROWS).astype(np.uint64), 0)


def ours() -> Callable[[int], float]:
    """Compiles our train step; returns a function that runs n steps and gives the last loss."""
    from flaxpretrain.program import avoid_known_faults

    avoid_known_faults()  # as every program does
    import jax

    from flaxpretrain.config import load
    from flaxpretrain.training import sharding
    from flaxpretrain.training.assembly import assemble

    run = load(ROOT / "configs" / "bert_small.py", OVERRIDES)
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        assembly = assemble(run, mesh, 100_000)
        step, state = assembly.train_step(run.phases[0]), assembly.initial_state()
        batch = sharding.to_device(batch_of(run), mesh, ROWS)

    def steps(count: int) -> float:
        nonlocal state
        metrics = None
        with jax.set_mesh(mesh):
            for _ in range(count):
                state, metrics = step(state, batch)
        jax.block_until_ready(state)
        return float(metrics.figures["loss"])

    return steps


def theirs() -> Callable[[int], float]:
    """Builds Transformers' model; returns a function that runs n steps and gives the last loss."""
    import numpy as np
    import torch
    from transformers import BertConfig, BertForMaskedLM, get_linear_schedule_with_warmup

    from flaxpretrain.config import load

    torch.set_num_threads(THREADS)
    run = load(ROOT / "configs" / "bert_small.py", OVERRIDES)
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**run.model.to_hf())).train()
    batch = batch_of(run)
    labels = np.full(batch["input_ids"].shape, -100, np.int64)
    rows = np.arange(ROWS)[:, None].repeat(batch["masked_positions"].shape[1], 1)
    real = batch["masked_weights"] > 0
    labels[rows[real], batch["masked_positions"][real]] = batch["masked_labels"][real]
    inputs = {
        "input_ids": torch.from_numpy(batch["input_ids"].astype(np.int64)),
        "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.int64),
        "labels": torch.from_numpy(labels),
    }
    decayed = [p for n, p in model.named_parameters() if "bias" not in n and "LayerNorm" not in n]
    others = [p for n, p in model.named_parameters() if "bias" in n or "LayerNorm" in n]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": run.optimizer.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=run.optimizer.learning_rate,
        eps=run.optimizer.eps,
        fused=True,
    )
    schedule = get_linear_schedule_with_warmup(optimizer, 10_000, 100_000)

    def steps(count: int) -> float:
        loss = None
        for _ in range(count):
            loss = model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return float(loss.detach())

    return steps


SIDES = {"flaxpretrain": ours, "transformers": theirs}


def serve(side: str) -> None:
    """A worker: for every number on stdin, runs so many steps; prints seconds and loss."""
    steps = SIDES[side]()
    print("ready", flush=True)
    for line in sys.stdin:
        started, worked = time.perf_counter(), time.process_time()
        loss = steps(int(line))
        print(time.perf_counter() - started, time.process_time() - worked, loss, flush=True)


class Worker:
    """One side, in a process of its own that sleeps between its turns."""

    def __init__(self, side: str, overrides: list[str]) -> None:
        """Starts it and waits until it is ready."""
        changes = [part for text in overrides for part in ("--set", text)]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": str(THREADS),
            "HF_HUB_OFFLINE": "1",
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # as run_pretraining.py has it
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", side, *changes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with exit code {self._process.wait()}")
        return line

    def turn(self, steps: int) -> tuple[float, float, float]:
        """Seconds a step, of which the processor's on all threads, and the last loss."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        seconds, worked, loss = (float(part) for part in self._answer().split())
        return seconds / steps, worked / steps, loss

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default: 7)")
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn (default: 8)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change the recipe further",
    )
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    OVERRIDES.extend(arguments.set)
    if arguments.serve:
        serve(arguments.serve)
        return
    workers = {side: Worker(side, arguments.set) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    worked: dict[str, list[float]] = {side: [] for side in SIDES}
    losses = dict.fromkeys(SIDES, 0.0)
    for worker in workers.values():
        worker.turn(3)  # compiles, fills caches
    for number in range(arguments.rounds):
        for side, worker in workers.items():
            each, processor, losses[side] = worker.turn(arguments.steps)
            seconds[side].append(each)
            worked[side].append(processor)
        parts = (
            f"{side} {seconds[side][-1] * 1e3:.1f} ms a step ({worked[side][-1] * 1e3:.1f} of CPU)"
            for side in SIDES
        )
        print(f"round {number}: {', '.join(parts)}", file=sys.stderr)
    for worker in workers.values():
        worker.close()
    write(seconds, worked, losses, arguments.steps)


def write(
    seconds: dict[str, list[float]],
    worked: dict[str, list[float]],
    losses: dict[str, float],
    steps: int,
) -> None:
    """Prints and keeps the medians."""
    rates = {side: ROWS * LENGTH / statistics.median(v) for side, v in seconds.items()}
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    packages = ("jax", "flax", "optax", "torch", "transformers")
    result = {
        "benchmark": "training_cpu",
        "date": datetime.date.today().isoformat(),
        "recipe": "bert_small",
        "overrides": OVERRIDES,
        "threads": THREADS,
        "steps_a_round": steps,
        "tokens_per_second": {side: round(value, 1) for side, value in rates.items()},
        "milliseconds_a_step": {
            side: [round(value * 1e3, 2) for value in values] for side, values in seconds.items()
        },
        "milliseconds_of_cpu_a_step": {
            side: [round(value * 1e3, 2) for value in values] for side, values in worked.items()
        },
        "ratio_of_medians": round(rates["flaxpretrain"] / rates["transformers"], 4),
        "ratio_by_round": [round(ratio, 4) for ratio in ratios],
        "last_losses": losses,
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "cpu_count": os.cpu_count(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    kept[f"jax {result['packages']['jax']}"] = result
    RESULT.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    for side, value in rates.items():
        print(f"{side:>14}: {value:9,.0f} tokens/s")
    print(f"ratio of medians {result['ratio_of_medians']:.3f}, by round {result['ratio_by_round']}")
    cpu = {side: statistics.median(values) for side, values in worked.items()}
    print(f"ratio by CPU time {cpu['transformers'] / cpu['flaxpretrain']:.3f}")


if __name__ == "__main__":
    main()
