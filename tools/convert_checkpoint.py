"""Converts between workdirs and Hugging Face folders, and proves that both compute the same.

    python tools/convert_checkpoint.py to-hf WORKDIR --output-dir FOLDER
    python tools/convert_checkpoint.py from-hf FOLDER_OR_HUB_ID --workdir WORKDIR

to-hf writes safetensors, config.json, the tokenizer and a model card, without torch; where torch
is installed, Transformers must load the result and compute the same within 2e-5. from-hf writes a
workdir whose checkpoint of step 0 holds the weights; it reads safetensors and pytorch_model.bin.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flaxpretrain import program
from flaxpretrain.config import load_recipe, render
from flaxpretrain.conversion import hub
from flaxpretrain.conversion.card import Facts
from flaxpretrain.conversion.export import export
from flaxpretrain.conversion.importing import import_model
from flaxpretrain.conversion.licences import require_licence
from flaxpretrain.conversion.sources import (
    dataset_facts,
    is_workdir,
    open_checkpoint,
    read_origin,
    run_facts,
)
from flaxpretrain.errors import UserError


def parser() -> program.Parser:
    """The arguments of both directions."""
    parser = program.Parser(__doc__)
    commands = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")

    there = commands.add_parser(
        "to-hf", help="a workdir's checkpoint to a Hugging Face folder", description=to_hf.__doc__
    )
    there.add_argument("workdir", type=Path, metavar="WORKDIR", help="with checkpoints")
    there.add_argument("--output-dir", type=Path, required=True, help="folder to write")
    there.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    there.add_argument("--part", help="which network, where the objective trains several")
    there.add_argument("--tokenizer", type=Path, help="its folder (default: the dataset's)")
    there.add_argument(
        "--recipe", type=Path, help="file of the classes that the run uses, if moved"
    )
    there.add_argument("--license", help="of the model, such as apache-2.0 (default: the corpus's)")
    there.add_argument("--name", help="title of the model card (default: the recipe's name)")
    there.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    there.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="size above which files are split, in GB"
    )
    there.add_argument(
        "--no-compare", action="store_true", help="skip the comparison with Transformers"
    )
    there.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder afterwards")
    there.add_argument(
        "--public", action="store_true", help="a repository made for the push is public"
    )

    back = commands.add_parser(
        "from-hf", help="a Hugging Face model to a new workdir", description=from_hf.__doc__
    )
    back.add_argument("source", metavar="FOLDER_OR_HUB_ID", help="owner/name, or a folder")
    back.add_argument("--workdir", type=Path, required=True, help="to make")
    back.add_argument("--recipe", type=Path, help="recipe to continue training with")
    return parser


def to_hf(arguments) -> None:
    """Writes a workdir's checkpoint as a Hugging Face folder."""
    workdir, output = arguments.workdir, arguments.output_dir
    if not is_workdir(workdir):
        raise UserError(f"{workdir} is no workdir: it has no folder checkpoints/")
    if arguments.max_shard_gb <= 0:
        raise UserError(f"--max-shard-gb must be positive; got {arguments.max_shard_gb}")
    if arguments.license is not None:
        require_licence(arguments.license)
    if arguments.recipe is not None:
        load_recipe(arguments.recipe)
    checkpoint = open_checkpoint(workdir, arguments.step)
    config, params = checkpoint.part(arguments.part)
    tokenizer = arguments.tokenizer or checkpoint.tokenizer
    if tokenizer is None:
        raise UserError(
            f"the tokenizer of {workdir} is neither there nor with its dataset: name its folder "
            "by --tokenizer"
        )
    run = checkpoint.run
    facts = run_facts(workdir)
    name = run.name if run else workdir.resolve().name
    exported = export(
        config,
        params,
        tokenizer,
        output,
        Facts(
            name=arguments.name or name,
            run=render(run) if run else None,
            dataset=dataset_facts(run, workdir),
            environment=facts,
            figures=checkpoint.metadata.get("figures", {}),
            step=checkpoint.step,
            command=facts.get("command", ""),
            base_model=read_origin(workdir).hub_id,
            licence=arguments.license,
        ),
        overwrite=arguments.overwrite,
        compare=not arguments.no_compare,
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
    )
    print(f"step {checkpoint.step} of {workdir}")
    for line in exported.lines():
        print(line)
    if arguments.push_to_hub is not None:
        address = hub.push(
            output,
            arguments.push_to_hub,
            private=not arguments.public,
            message=f"Step {checkpoint.step}",
        )
        print(f"pushed to {address}")


def from_hf(arguments) -> None:
    """Writes a workdir at step 0 with the weights and the tokenizer of a Hugging Face model."""
    run = None if arguments.recipe is None else load_recipe(arguments.recipe)
    made = import_model(arguments.source, arguments.workdir, run, say=print)
    print(f"{made.workdir}: {made.parameters:,} parameters of a {made.config.model_type}, step 0")
    recipe = "RECIPE" if arguments.recipe is None else str(arguments.recipe)
    command = f"python run_pretraining.py {shlex.quote(recipe)} --workdir {made.workdir}"
    print(f"continue with: {' '.join([command, *made.flags])}")


def main(argv: list[str]) -> None:
    """Runs one direction."""
    arguments = parser().parse_args(argv)
    {"to-hf": to_hf, "from-hf": from_hf}[arguments.direction](arguments)


if __name__ == "__main__":
    program.run(main)
