"""Generation on the CPU beside PyTorch Transformers: the same weights, prompts and strategy.

    python benchmarks/generation.py

Random weights in float32, prompts of equal length, no token that ends a text, two threads each.
Theirs is `generate` with its cache, as it comes; ours the jitted loop. The sides take turns, in
processes of their own, and each waits while the other runs; both must write the same tokens. Prints
a table, and writes medians and ratios to benchmarks/results/generation.json.
"""

import argparse
import datetime
import hashlib
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

RESULT = ROOT / "benchmarks" / "results" / "generation.json"
THREADS = 2
CASES = {
    "gpt2_small greedy": {"model": "gpt2", "rows": 8, "prompt": 32, "new": 32, "beams": 1},
    "gpt2_small beams": {"model": "gpt2", "rows": 2, "prompt": 32, "new": 32, "beams": 4},
    "t5_v1_1_small greedy": {"model": "t5", "rows": 8, "prompt": 64, "new": 32, "beams": 1},
    "bart_base greedy": {"model": "bart", "rows": 8, "prompt": 64, "new": 32, "beams": 1},
}
"""Rows of a batch, tokens of a prompt or source, and new tokens."""


def config_of(model: str):
    """The configuration of a released size."""
    from flaxpretrain.models.bart import BartConfig
    from flaxpretrain.models.gpt2 import GPT2Config
    from flaxpretrain.models.t5 import T5Config

    if model == "gpt2":
        return GPT2Config()
    if model == "bart":
        return BartConfig(forced_eos_token_id=None)
    return T5Config(
        d_ff=1024,
        num_layers=8,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )


def params_of(config):
    """Random weights, the same on both sides."""
    import jax
    import numpy as np

    from flaxpretrain.models.functional import model_of

    return jax.tree.map(np.asarray, jax.jit(model_of(config.build).init)(jax.random.key(0)))


def prompts_of(case: dict) -> list[list[int]]:
    """Random tokens."""
    import numpy as np

    shape = (case["rows"], case["prompt"])
    return np.random.default_rng(0).integers(100, 20_000, shape).tolist()


def ours(case: dict) -> Callable[[], list]:
    """Our generator; returns a function that generates once."""
    from flaxpretrain.program import avoid_known_faults

    avoid_known_faults()  # as every program does
    from flaxpretrain.generation.generator import Generator
    from flaxpretrain.generation.rules import Rules
    from flaxpretrain.generation.strategies import Beam, Greedy

    config = config_of(case["model"])
    rules = Rules(start=getattr(config, "decoder_start_token_id", None))
    generator = Generator(config, params_of(config), rules)
    strategy = Beam(case["beams"]) if case["beams"] > 1 else Greedy()
    prompts = prompts_of(case)

    def generate() -> list:
        found = generator.generate(prompts, strategy, max_new_tokens=case["new"])
        return [list(texts[0].ids) for texts in found]

    return generate


def theirs(case: dict) -> Callable[[], list]:
    """Transformers' model of the same weights; returns a function that generates once."""
    import torch
    import transformers

    from flaxpretrain.models.names import to_state_dict

    torch.set_num_threads(THREADS)
    config = config_of(case["model"])
    values = config.to_hf()
    kind = getattr(transformers, values["architectures"][0])
    network = kind(kind.config_class(**values)).eval()
    tensors = to_state_dict(params_of(config), config.names, config.vocab_size)
    if "lm_head.weight" in tensors:
        network.lm_head.weight = torch.nn.Parameter(torch.empty_like(network.lm_head.weight))
    network.load_state_dict({n: torch.tensor(a) for n, a in tensors.items()}, strict=False)
    settings = network.generation_config
    settings.eos_token_id, settings.pad_token_id = None, 0
    settings.forced_eos_token_id = settings.bos_token_id = None
    ids = torch.tensor(prompts_of(case))
    skipped = 1 if network.config.is_encoder_decoder else ids.shape[1]

    def generate() -> list:
        with torch.inference_mode():
            found = network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=case["new"],
                do_sample=False,
                num_beams=case["beams"],
            )
        return found[:, skipped:].tolist()

    return generate


SIDES = {"flaxpretrain": ours, "transformers": theirs}


def serve(side: str, case: dict) -> None:
    """A worker: for every line on stdin, generates once; prints seconds and what was written."""
    generate = SIDES[side](case)
    generate()  # compiles, fills caches
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        texts = generate()
        seconds = time.perf_counter() - started
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
        print(seconds, digest, flush=True)


class Worker:
    """One side, in a process of its own that sleeps between its turns."""

    def __init__(self, side: str, case: str) -> None:
        """Starts it."""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": str(THREADS),
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", side, "--case", case],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def answer(self) -> str:
        """A line of what the process says."""
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with exit code {self._process.wait()}")
        return line

    def turn(self) -> tuple[float, str]:
        """Seconds, and the digest of the tokens."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        seconds, digest = self.answer().split()
        return float(seconds), digest

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def measure(name: str, rounds: int) -> dict:
    """Rates of both sides in one case."""
    case = CASES[name]
    workers = {}
    for side in SIDES:
        workers[side] = Worker(side, name)
        workers[side].answer()
        print(f"{name}: {side} is ready", file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    written: dict[str, str] = {}
    for _ in range(rounds):
        for side, worker in workers.items():
            took, written[side] = worker.turn()
            seconds[side].append(took)
            print(f"{name}: {side} {took:.2f} s", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.close()
    tokens = case["rows"] * case["new"]
    rates = {side: tokens / statistics.median(values) for side, values in seconds.items()}
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    return {
        **case,
        "tokens_per_second": {side: round(value, 1) for side, value in rates.items()},
        "ratio_of_medians": round(rates["flaxpretrain"] / rates["transformers"], 4),
        "ratio_by_round": [round(ratio, 4) for ratio in ratios],
        "same_tokens": len(set(written.values())) == 1,
    }


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--case", choices=CASES, help="only this one; the others are kept")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, CASES[arguments.case])
        return
    cases = json.loads(RESULT.read_text())["cases"] if RESULT.is_file() else {}
    for name in [arguments.case] if arguments.case else CASES:
        cases[name] = measure(name, arguments.rounds)
        found = cases[name]
        shown = (f"{side} {rate:,.0f}" for side, rate in found["tokens_per_second"].items())
        print(
            f"{name:>22}: {', '.join(shown)} tokens/s; ratio {found['ratio_of_medians']:.2f}, "
            f"by round {found['ratio_by_round']}, same tokens: {found['same_tokens']}"
        )
    result = {
        "benchmark": "generation",
        "date": datetime.date.today().isoformat(),
        "threads": THREADS,
        "cases": {name: cases[name] for name in CASES if name in cases},
        "packages": {n: importlib.metadata.version(n) for n in ("jax", "torch", "transformers")},
        "cpu_count": os.cpu_count(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
