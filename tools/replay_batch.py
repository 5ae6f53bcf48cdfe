"""Writes the batch of a step to a file, and scores a written batch with a checkpoint.

    python tools/replay_batch.py runs/quickstart --batch-step 120 --dump batch.npz
    python tools/replay_batch.py runs/quickstart --replay batch.npz

The batch of a step depends on dataset, seeds and step alone, so a step that went wrong can be
looked at after the run: its ids, its noise, and what the model says of them before and after.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from flaxpretrain import program
from flaxpretrain.config import parse
from flaxpretrain.data.pipeline import digest, dump, replay
from flaxpretrain.errors import UserError
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble
from flaxpretrain.training.checkpoints import Checkpoints
from flaxpretrain.training.session import (
    mixing_history,
    open_pipeline,
    open_run_dataset,
    resolve_phases,
)


def parser() -> program.Parser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument("workdir", type=Path, metavar="WORKDIR", help="with checkpoints")
    parser.add_argument(
        "--batch-step", type=int, help="write the batch that this training step saw, from 1"
    )
    parser.add_argument("--dump", type=Path, metavar="FILE", help=".npz to write it to")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="score this batch instead")
    parser.add_argument("--step", type=int, help="of the checkpoint; none: the newest")
    return parser


def main(argv: list[str]) -> None:
    """Dumps, replays, or both."""
    arguments = parser().parse_args(argv)
    if (arguments.batch_step is None) == (arguments.replay is None):
        raise UserError("give one of --batch-step N and --replay FILE")
    checkpoints = Checkpoints(arguments.workdir / "checkpoints")
    params, metadata, step = checkpoints.restore_params(step=arguments.step)
    if metadata.get("run") is None:
        raise UserError(f"{arguments.workdir} holds converted weights that no run has trained yet")
    run = parse(metadata["run"])
    if arguments.replay is not None:
        batch = replay(arguments.replay)
    else:
        dataset = open_run_dataset(run, arguments.workdir)
        history = mixing_history(run, metadata, step)
        pipeline = open_pipeline(run, dataset, resolve_phases(run, dataset), history)
        if not 1 <= arguments.batch_step <= pipeline.steps:
            raise UserError(
                f"--batch-step {arguments.batch_step}: expected 1 to {pipeline.steps}, the steps "
                "of the run"
            )
        batch = pipeline.batch(arguments.batch_step - 1)
    if arguments.dump is not None:
        dump(batch, arguments.dump)
    # One device: a batch of any size fits its mesh.
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        assembly = assemble(run, mesh, 1)
        sums = assembly.eval_step()(params, batch)
    figures = run.objective.summarize(jax.device_get(sums))
    print(json.dumps({"checkpoint": step, "batch": digest(batch), "figures": figures}))


if __name__ == "__main__":
    program.run(main)
