"""Converts between workdirs, Hugging Face folders and TensorFlow checkpoints, and checks outputs.

    python tools/convert_checkpoint.py to-hf WORKDIR --output-dir FOLDER [--part discriminator]
    python tools/convert_checkpoint.py from-hf FOLDER_OR_HUB_ID --workdir WORKDIR
    python tools/convert_checkpoint.py from-hf GENERATOR DISCRIMINATOR --workdir DATA/models/NAME
    python tools/convert_checkpoint.py from-tf CHECKPOINT_PREFIX --output-dir FOLDER
    python tools/convert_checkpoint.py from-tf CHECKPOINT_PREFIX --workdir DATA/models/NAME

to-hf writes safetensors, config.json, the tokenizer and a model card, without torch; where torch
is installed, Transformers must load the result and compute the same within 2e-5. from-hf writes a
workdir whose checkpoint of step 0 holds the weights; it reads safetensors and pytorch_model.bin.
from-tf reads what google-research/bert and google-research/electra save, without TensorFlow, and
writes either of the two. Both networks of an ELECTRA go into one workdir, whose pretraining goes on
by --recipe or, without one, by hparams as in the original.
"""

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flaxpretrain import program
from flaxpretrain.config import Run, load_recipe, render
from flaxpretrain.conversion import hub
from flaxpretrain.conversion.card import Facts
from flaxpretrain.conversion.export import export
from flaxpretrain.conversion.folders import HubModel, config_of, params_of
from flaxpretrain.conversion.importing import (
    Imported,
    require_unused,
    write_workdir,
)
from flaxpretrain.conversion.joint import pair_of
from flaxpretrain.conversion.licences import require_licence
from flaxpretrain.conversion.resizing import resized_for_tokenizer
from flaxpretrain.conversion.sources import (
    Checkpoint,
    Origin,
    dataset_facts,
    is_workdir,
    open_checkpoint,
    open_model,
    read_origin,
    run_facts,
)
from flaxpretrain.conversion.tensorflow import DISCRIMINATOR, GENERATOR, read_checkpoint
from flaxpretrain.data import tokenizers
from flaxpretrain.electra_hparams import read_hparams, run_of
from flaxpretrain.electra_import import hparams_for
from flaxpretrain.errors import UserError
from flaxpretrain.training.session import write_json

HPARAMS_FILE = "hparams.json"
"""In a workdir that was made without a recipe: what --hparams of run_pretraining.py takes."""


def parser() -> program.Parser:
    """The arguments of all directions."""
    parser = program.Parser(__doc__)
    commands = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")

    there = commands.add_parser(
        "to-hf", help="a workdir's checkpoint to a Hugging Face folder", description=to_hf.__doc__
    )
    there.add_argument("workdir", type=Path, metavar="WORKDIR", help="with checkpoints")
    there.add_argument("--output-dir", type=Path, required=True, help="folder to write")
    there.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    there.add_argument(
        "--part",
        help="which network, where the objective trains several; all: a folder each in the output",
    )
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
    back.add_argument(
        "source",
        metavar="FOLDER_OR_HUB_ID",
        nargs="+",
        help="owner/name, or a folder; two for generator and discriminator of an ELECTRA",
    )
    back.add_argument("--workdir", type=Path, required=True, help="to make")
    back.add_argument(
        "--tokenizer",
        type=Path,
        help="folder of the model's tokenizer with more tokens, which get embeddings (default: its "
        "own tokenizer)",
    )
    add_continuing(back)
    add_from_tf(commands)
    return parser


def add_continuing(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how pretraining goes on."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--recipe", type=Path, help="recipe to continue training with, in --workdir")
    how.add_argument(
        "--hparams",
        metavar="JSON",
        help="for both networks of an ELECTRA, without --recipe: the original's hparams, as text "
        "or a path to a .json; sizes need not be told (default: {})",
    )


def add_from_tf(commands: argparse._SubParsersAction) -> None:
    """The arguments of from-tf."""
    old = commands.add_parser(
        "from-tf",
        help="a TensorFlow checkpoint of BERT or ELECTRA to either",
        description=from_tf.__doc__,
    )
    old.add_argument(
        "prefix",
        type=Path,
        metavar="CHECKPOINT_PREFIX",
        help="its path without .index or .data-..., such as models/x/model.ckpt-1000",
    )
    old.add_argument("--workdir", type=Path, help="to make, with the weights as step 0")
    old.add_argument("--output-dir", type=Path, help="Hugging Face folder to write")
    old.add_argument(
        "--part",
        choices=[DISCRIMINATOR, GENERATOR],
        help="of ELECTRA (default: a folder each, or both in one workdir)",
    )
    old.add_argument(
        "--config", type=Path, help="bert_config.json or the like (default: the one beside it)"
    )
    old.add_argument("--vocab-file", type=Path, help="(default: vocab.txt beside the checkpoint)")
    case = old.add_mutually_exclusive_group()
    case.add_argument("--do-lower-case", dest="lowercase", action="store_true", help="the default")
    case.add_argument("--no-lower-case", dest="lowercase", action="store_false", help="keep case")
    accents = old.add_mutually_exclusive_group()
    accents.add_argument("--strip-accents", action="store_true", help="default: as the case")
    accents.add_argument("--no-strip-accents", dest="strip_accents", action="store_false")
    old.set_defaults(lowercase=None, strip_accents=None)
    add_continuing(old)
    old.add_argument("--license", help="of the model, for its card, such as apache-2.0")
    old.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    old.add_argument(
        "--no-compare", action="store_true", help="skip the comparison with Transformers"
    )


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
    parts: list[str | None] = [arguments.part]
    if arguments.part in ("all", "both"):
        parts = list(checkpoint.parts)
        if arguments.push_to_hub is not None:
            raise UserError("--push-to-hub is for one network: choose it by --part")
    print(f"step {checkpoint.step} of {workdir}")
    for part in parts:
        export_part(checkpoint, part, output if len(parts) == 1 else output / str(part), arguments)
    if arguments.push_to_hub is not None:
        address = hub.push(
            output,
            arguments.push_to_hub,
            private=not arguments.public,
            message=f"Step {checkpoint.step}",
        )
        print(f"pushed to {address}")


def export_part(checkpoint: Checkpoint, part: str | None, output: Path, arguments) -> None:
    """Writes one network of a checkpoint as a Hugging Face folder and prints what it is."""
    workdir = checkpoint.workdir
    config, params = checkpoint.part(part)
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
    for line in exported.lines():
        print(line)


def from_hf(arguments) -> None:
    """Writes a workdir at step 0 with the weights and the tokenizer of Hugging Face models."""
    require_unused(arguments.workdir)
    opened = {source: open_model(source) for source in arguments.source}
    if len(opened) < len(arguments.source):
        raise UserError(f"{arguments.source[0]} is given twice: name a folder for each network")
    models = {source: model for source, (model, _) in opened.items()}
    if arguments.tokenizer is not None:
        models = {
            source: resized_for_tokenizer(model, arguments.tokenizer, source, print)
            for source, model in models.items()
        }
    make_workdir(models, opened[arguments.source[0]][1], arguments)


def make_workdir(models: Mapping[str, HubModel], origin: Origin, arguments) -> None:
    """Writes the workdir of one network, or of a generator and a discriminator, and says so."""
    workdir, hparams = arguments.workdir, None
    run: Run | None = None
    if arguments.recipe is not None:
        run = load_recipe(arguments.recipe)
    elif len(models) > 1:
        pair = pair_of(models)
        given = arguments.hparams or "{}"
        hparams = hparams_for(pair.discriminator, pair.generator, pair.sharing, given)
        run = run_of(read_hparams(json.dumps(hparams)), workdir.name, data_dir_of(workdir))
    elif arguments.hparams is not None:
        raise UserError("--hparams is for both networks of an ELECTRA: give both, or a --recipe")
    first, *others = models
    more = {name: models[name] for name in others}
    made = write_workdir(models[first], origin, workdir, run, source=first, say=print, more=more)
    architecture = models[first].values.get("architectures") or [made.config.model_type]
    kind = "generator and discriminator" if others else architecture[0]
    print(f"{workdir}: {made.parameters:,} parameters of {kind}, step 0")
    print(f"continue with: {continuing(made, hparams, arguments.recipe)}")


def data_dir_of(workdir: Path) -> Path | None:
    """The dataset's folder, where the workdir lies as run_pretraining.py --data-dir puts it."""
    return workdir.parent.parent if workdir.parent.name == "models" else None


def continuing(made: Imported, hparams: Mapping | None, recipe: Path | None) -> str:
    """The command that goes on with a workdir; keeps its hparams in a file, where it has any."""
    workdir = made.workdir
    if hparams is None:
        parts = [shlex.quote("RECIPE" if recipe is None else str(recipe)), f"--workdir {workdir}"]
    else:
        write_json(workdir / HPARAMS_FILE, hparams)
        data = data_dir_of(workdir)
        parts = [f"--data-dir {data or 'DATA'} --model-name {workdir.name}"]
        parts += [] if data else [f"--workdir {workdir}"]
        parts.append(f"--hparams {workdir / HPARAMS_FILE}")
    return " ".join(["python run_pretraining.py", *parts, *made.flags])


def from_tf(arguments) -> None:
    """Writes what google-research/bert or electra trained as a workdir or a Hugging Face folder."""
    prefix, workdir, output = arguments.prefix, arguments.workdir, arguments.output_dir
    if workdir is None and output is None:
        raise UserError("say where to write: --workdir, --output-dir, or both")
    for name in ("recipe", "hparams"):
        if getattr(arguments, name) is not None and workdir is None:
            raise UserError(f"--{name} is for --workdir, which is not given")
    if arguments.license is not None:
        require_licence(arguments.license)
    if workdir is not None:
        require_unused(workdir)
    vocab = arguments.vocab_file or prefix.with_name("vocab.txt")
    if not vocab.is_file():
        raise UserError(f"{vocab} is not there: name the vocabulary's file by --vocab-file")
    read = read_checkpoint(prefix, arguments.config)
    print(f"{prefix}: {' and '.join(read.models)}; dropped {read.dropped} tensors of the optimizer")
    if read.heads_assumed:
        print(f"{prefix}: no configuration states num_attention_heads; took hidden_size // 64")
    models = chosen_parts(read.models, arguments.part)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizers.load(vocab, arguments.lowercase, arguments.strip_accents)
        tokenizer.save(folder)
        whole = {p: with_tokenizer(m, tokenizer, Path(folder), vocab) for p, m in models.items()}
        names = {p: f"{prefix.name}, {p}" if len(read.models) > 1 else prefix.name for p in models}
        if workdir is not None:
            name = next(iter(names.values())) if len(models) == 1 else prefix.name
            sources = {
                f"{prefix}, {p}" if len(models) > 1 else str(prefix): whole[p] for p in whole
            }
            make_workdir(sources, Origin(name), arguments)
        if output is not None:
            for part, model in whole.items():
                place = output / part if len(models) > 1 else output
                write_folder(model, Path(folder), place, names[part], arguments)


def chosen_parts(models: Mapping[str, HubModel], part: str | None) -> Mapping[str, HubModel]:
    """The networks to convert.

    Raises:
        UserError: the checkpoint lacks the part.
    """
    if part is not None and part not in models:
        raise UserError(f"--part {part}: the checkpoint holds {' and '.join(models)}")
    return models if part is None else {part: models[part]}


def with_tokenizer(
    model: HubModel, tokenizer: tokenizers.Tokenizer, folder: Path, vocab: Path
) -> HubModel:
    """The model with the tokenizer in `folder`, whose padding token it takes.

    The original pads with id 0, whatever token that is. Raises UserError where the vocabulary has
    tokens beyond the model's.
    """
    size, pad = model.values["vocab_size"], tokenizer.vocabulary.pad
    if tokenizer.vocabulary.size > size:
        raise UserError(
            f"{vocab} has {tokenizer.vocabulary.size} tokens, but the checkpoint only {size}: name "
            "the vocabulary that it was trained with by --vocab-file"
        )
    values = model.values if pad is None else {**model.values, "pad_token_id": pad}
    return dataclasses.replace(model, values=values, tokenizer=folder)


def write_folder(model: HubModel, tokenizer: Path, folder: Path, name: str, arguments) -> None:
    """Writes a model as a Hugging Face folder and prints what it is."""
    config = config_of(model)
    params, notes = params_of(model, config, source=str(arguments.prefix))
    for note in notes:
        print(f"{arguments.prefix}: {note}")
    exported = export(
        config,
        params,
        tokenizer,
        folder,
        Facts(name=name, licence=arguments.license),
        overwrite=arguments.overwrite,
        compare=not arguments.no_compare,
    )
    for line in exported.lines():
        print(line)


def main(argv: list[str]) -> None:
    """Runs one direction."""
    arguments = parser().parse_args(argv)
    {"to-hf": to_hf, "from-hf": from_hf, "from-tf": from_tf}[arguments.direction](arguments)


if __name__ == "__main__":
    program.run(main)
