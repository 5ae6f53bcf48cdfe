"""Builds a dataset in parts on Apache Beam: on this machine, on Dataflow, Flink or Spark.

    python tools/build_on_beam.py --parts 64 --output-dir DATA \\
        --beam="--runner=DirectRunner --direct_num_workers=8" \\
        --source hf:org/name --tokenizer TOKENIZER

All other flags are those of tools/build_pretraining_dataset.py, which runs once for each part. What
it makes is what that program makes in so many parts, put together by --merge. Workers must see the
text, the tokenizer, this checkout and DATA under the same paths: a shared disk or a mounted bucket,
and an image with the checkout (--sdk_container_image). The same command goes on after a stop.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flaxpretrain import program
from flaxpretrain.data.fan_out import run
from flaxpretrain.errors import UserError

BUILDER = Path(__file__).resolve().with_name("build_pretraining_dataset.py")
OURS = ("--shard", "--merge", "--num-processes")


def parser() -> program.Parser:
    """The arguments beside the builder's."""
    parser = program.Parser(__doc__)
    add = parser.add_argument
    add("--parts", type=int, required=True, help="how many; several for each worker even it out")
    add("--output-dir", type=Path, required=True, help="the dataset's folder")
    add("--beam", default="", metavar="OPTIONS", help="Beam's, in one text; default: run here")
    add("--python", default=sys.executable, help="that runs the builder on a worker")
    add("--builder", default=str(BUILDER), metavar="PATH", help="of the builder on a worker")
    add("--overwrite", action="store_true", help="replace a dataset that is there")
    return parser


def main(argv: list[str]) -> None:
    """Builds all parts and merges them."""
    arguments, rest = parser().parse_known_args(argv)
    for flag in rest:
        if flag.partition("=")[0] in OURS:
            raise UserError(f"{flag} is set for each part by this program: leave it out")
    command = [arguments.python, arguments.builder, *rest, "--output-dir"]
    command.append(str(arguments.output_dir.absolute()))
    if arguments.overwrite:
        command.append("--overwrite")
    run(
        command,
        arguments.output_dir.absolute(),
        arguments.parts,
        shlex.split(arguments.beam),
        overwrite=arguments.overwrite,
    )


if __name__ == "__main__":
    program.run(main)
