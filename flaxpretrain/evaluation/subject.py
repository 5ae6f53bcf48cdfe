"""What is evaluated: a model with the run that says how it reads text."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from flaxpretrain.config import Data, Phase, Run, parse
from flaxpretrain.conversion.folders import CONFIG_FILE, GENERATION_FILE
from flaxpretrain.conversion.sources import (
    CHECKPOINTS,
    Checkpoint,
    is_workdir,
    load_pretrained,
)
from flaxpretrain.conversion.tensors import read_json
from flaxpretrain.data.infilling import BartNoise
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.noising import SpanCorruption
from flaxpretrain.data.rows import Blocks
from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import model_of
from flaxpretrain.objectives.causal_lm import CausalLM
from flaxpretrain.objectives.masked_lm import MaskedLM
from flaxpretrain.objectives.objective import Objective
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training.checkpoints import Checkpoints
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import Constant

LENGTH = 128
"""Tokens a row for a model that no run here has trained, where its positions allow so many."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model as numpy parameters, and how it was or would have been trained.

    `params` are those of the run's whole objective. `step` and `workdir` are None for what is no
    workdir; `tokenizer` is a folder; `trained` says whether `run` is one that really took place.
    """

    name: str
    run: Run
    params: PyTree
    tokenizer: Path | None
    step: int | None = None
    workdir: Path | None = None
    trained: bool = False


def open_subject(source: str | Path, step: int | None = None) -> Subject:
    """Opens a workdir (its newest checkpoint or that of `step`), a Hugging Face folder or a hub id.

    Raises:
        UserError: no such source, or one that cannot be read.
    """
    folder = Path(source)
    if not is_workdir(folder):
        if step is not None:
            raise UserError(f"--step {step}: {source} is no workdir with checkpoints")
        config, params, tokenizer = load_pretrained(source)
        return Subject(str(source), stand_in_run(config), params, tokenizer)
    params, metadata, found = Checkpoints(folder / CHECKPOINTS).restore_params(step=step)
    if metadata.get("run") is not None:
        run = parse(metadata["run"])
    elif metadata.get("model") is not None:
        run = stand_in_run(parse(metadata["model"]))
    else:
        raise UserError(f"the checkpoints in {folder} do not say which model they are of")
    tokenizer = Checkpoint(folder, found, run, {}, metadata).tokenizer
    trained = metadata.get("run") is not None
    return Subject(folder.resolve().name, run, params, tokenizer, found, folder, trained)


def generation_settings(source: str | Path, tokenizer: Path | None) -> dict[str, Any]:
    """What a Hugging Face folder or hub id says of generation; nothing for a workdir.

    From config.json, where older releases of Transformers keep it, and generation_config.json.
    `tokenizer` is the model's folder where `source` is a hub id.
    """
    folder = Path(source)
    if is_workdir(folder):
        return {}
    if not folder.is_dir():
        folder = tokenizer or folder
    files = [folder / name for name in (CONFIG_FILE, GENERATION_FILE)]
    stated: dict[str, Any] = {}
    for path in files:
        if path.is_file():
            stated |= {k: v for k, v in read_json(path).items() if v is not None}
    return stated


def stand_in_run(config: Any) -> Run:
    """How a model from elsewhere is evaluated in full rows.

    Masked language models with 15 % masks; decoders on the next token; encoder-decoders on T5's
    spans or BART's noise.
    """
    model = model_of(config.build)
    network = model.bind(model.abstract())
    objective: Objective = MaskedLM(masking=TokenMasking(rate=0.15))
    if hasattr(network, "decode_causally"):
        objective = CausalLM()
    elif hasattr(network, "embed_decoder"):
        noise = BartNoise() if config.model_type == "bart" else SpanCorruption()
        objective = SpanDenoising(noise=noise)
    return Run(
        model=config,
        objective=objective,
        data=Data(layout=Blocks()),
        optimizer=AdamW(1e-4),
        schedule=Constant(),
        phases=(Phase(steps=1, length=min(LENGTH, config.max_length or LENGTH), batch_size=1),),
    )
