"""What the chunked vocabulary loss saves in memory, by the compiler for TPUs; no TPU needed.

    python benchmarks/chunked_loss.py

Compiles the train step of gpt2_small for one slice with the logits of a row made at once and in
parts, which the backward pass makes again. Needs the libtpu package. Temporaries are the
compiler's figure of one device; where a step does not fit, what it would need is the compiler's
sentence. Writes benchmarks/results/chunked_loss.json.
"""

import datetime
import importlib.metadata
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flaxpretrain import program
from flaxpretrain.analysis.topology import compile_step, prepare_environment
from flaxpretrain.config import load

RESULT = ROOT / "benchmarks" / "results" / "chunked_loss.json"


def main(argv: list[str]) -> None:
    """Compiles once a number of chunks and writes the result."""
    parser = program.Parser(__doc__)
    parser.add_argument("--topology", default="v5e:4x4", help="the slice (default: v5e:4x4)")
    parser.add_argument("--batch-size", type=int, default=128, help="rows a step (default: 128)")
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[1, 8], help="parts of a row (default: 1 8)"
    )
    parser.add_argument("--output", type=Path, default=RESULT, help="file of the result")
    arguments = parser.parse_args(argv)
    prepare_environment()
    steps = []
    for chunks in arguments.chunks:
        overrides = [f"batch_size={arguments.batch_size}", f"objective.chunks={chunks}"]
        run = load(ROOT / "configs" / "gpt2_small.py", overrides)
        report, _ = compile_step(run, arguments.topology, 0)
        steps.append(
            {
                "overrides": overrides,
                "rows_a_device": arguments.batch_size // report.devices,
                "fits": report.fits,
                "verdict": report.verdict,
                "needed_bytes": report.needed_bytes,
                "argument_bytes": report.argument_bytes,
                "temporary_bytes": report.temporary_bytes,
                "compiled_over_formula_flops": report.compiled_flops
                and round(report.compiled_flops / report.formula_flops, 3),
                "estimated_tokens_per_second_per_chip": report.estimated_tokens_per_second_per_chip
                and round(report.estimated_tokens_per_second_per_chip),
            }
        )
        print(json.dumps(steps[-1]), flush=True)
    result = {
        "benchmark": "chunked_loss",
        "date": datetime.date.today().isoformat(),
        "recipe": "gpt2_small",
        "topology": arguments.topology,
        "packages": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "steps": steps,
    }
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    program.run(main)
