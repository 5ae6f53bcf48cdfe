"""Objectives and architectures compared at equal FLOPs, as T5 was chosen.

Every cell of a grid trains on its own noise with so many FLOPs, and then on one task that all have
in common with a share of that; the loss on the common task is what they are compared by.

Reference: T5, https://arxiv.org/abs/1910.10683, sections 3.2 and 3.3, where the common tasks are
GLUE and others.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import jax
import numpy as np
from jaxtyping import PyTree

from flaxpretrain.config import Checkpoints as Keeping
from flaxpretrain.config import Data, Logging, Phase, Run, Seeds
from flaxpretrain.data.framing import ArraySpec
from flaxpretrain.data.noising import VARIANTS, SpanCorruption
from flaxpretrain.data.rows import Blocks
from flaxpretrain.data.spans import Suffix
from flaxpretrain.data.store import open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import model_of
from flaxpretrain.models.gpt2 import GPT2Config
from flaxpretrain.models.t5 import T5Config
from flaxpretrain.objectives.objective import Objective
from flaxpretrain.objectives.prefix_lm import PrefixLM
from flaxpretrain.objectives.shared_stack import SharedStack
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training.checkpoints import Checkpoints
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.loop import train
from flaxpretrain.training.metrics import read_metrics
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import Cosine

ARCHITECTURES = ("encoder-decoder", "shared", "prefix lm", "lm")
NOTHING = "nothing"
"""The objective of a cell that sees the common task alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One choice; `rate` and `span` are None where the noise has no such number."""

    architecture: str
    objective: str
    rate: float | None = None
    span: float | None = None

    @property
    def name(self) -> str:
        """What the cell is called, also as a folder."""
        numbers = [f"{x:g}" for x in (self.rate, self.span) if x is not None]
        return " ".join([self.architecture, self.objective, *numbers]).replace(" ", "_")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cells have in common.

    flops: of the training of one cell on its own noise, forward and backward.
    probe: name of the common task's noise. probe_share: of `flops`, for the common task.
    width, layers: of the encoder, the decoder, and a decoder alone, heads being of 32 numbers.
    """

    data: str
    flops: float = 1e13
    probe: str = "prefix lm"
    probe_share: float = 0.25
    width: int = 128
    layers: int = 2
    length: int = 128
    batch_size: int = 16
    learning_rate: float = 2e-3
    eval_rows: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError on numbers that cannot be."""
        if self.probe not in VARIANTS:
            raise UserError(f"--probe: expected one of {', '.join(VARIANTS)}; got {self.probe!r}")
        if not 0 < self.probe_share <= 1:
            raise UserError(
                f"--probe-share must lie above 0 and at most at 1; got {self.probe_share}"
            )
        if self.flops <= 0 or self.width < 32 or self.width % 32:
            raise UserError("--flops must be positive and --width a multiple of 32")


class Result(NamedTuple):
    """Of a cell: parameters, steps on its noise, and losses in nats a target token with accuracies.

    Its own are those of its own noise, which do not compare between noises.
    """

    parameters: int
    steps: int
    own_loss: float | None
    own_accuracy: float | None
    probe_loss: float
    probe_accuracy: float
    seconds: float


def grid(
    architectures: Sequence[str],
    objectives: Sequence[str],
    rates: Sequence[float],
    spans: Sequence[float],
) -> list[Cell]:
    """All combinations; noise without a rate or a span length is there once.

    Raises:
        UserError: an unknown architecture or objective.
    """
    for flag, names, known in (
        ("architectures", architectures, ARCHITECTURES),
        ("objectives", objectives, (NOTHING, *VARIANTS)),
    ):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UserError(f"--{flag}: expected some of {', '.join(known)}; got {unknown[0]!r}")
    cells = []
    for architecture in architectures:
        for objective in objectives:
            fields = _numbers_of(objective)
            for rate in rates if "rate" in fields else [None]:
                for span in spans if "mean_length" in fields else [None]:
                    cells.append(
                        Cell(architecture=architecture, objective=objective, rate=rate, span=span)
                    )
    return cells


def _numbers_of(objective: str) -> set[str]:
    # A prefix LM cuts texts where it does: another rate is no other share of noise in between.
    if objective == NOTHING or isinstance(VARIANTS[objective].pattern, Suffix):
        return set()
    fields = {field.name for field in dataclasses.fields(VARIANTS[objective].pattern)}
    return fields & {"rate", "mean_length"}


def noise_of(cell: Cell) -> SpanCorruption:
    """The noise of a cell that trains on one."""
    noise = VARIANTS[cell.objective]
    numbers: Any = {"rate": cell.rate, "mean_length": cell.span}
    changes: Any = {name: value for name, value in numbers.items() if value is not None}
    return dataclasses.replace(noise, pattern=dataclasses.replace(noise.pattern, **changes))


def objective_of(architecture: str, noise: SpanCorruption) -> Objective:
    """How an architecture learns a noise."""
    task = SpanDenoising(noise=noise)
    if architecture == "encoder-decoder":
        return task
    if architecture == "shared":
        return SharedStack(task=task)
    return PrefixLM(task=task, sees_source=architecture == "prefix lm")


def model_of_cell(cell: Cell, setting: Setting, vocab_size: int, positions: int) -> Any:
    """Its configuration: T5 v1.1 without dropout, or GPT-2 of the same sizes."""
    heads = setting.width // 32
    if cell.architecture in ("encoder-decoder", "shared"):
        return T5Config(
            vocab_size=vocab_size,
            d_model=setting.width,
            d_kv=32,
            d_ff=4 * setting.width,
            num_layers=setting.layers,
            num_heads=heads,
            dropout_rate=0.0,
        )
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=positions,
        n_embd=setting.width,
        n_layer=setting.layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def runs_of(cell: Cell, setting: Setting) -> tuple[Run | None, Run]:
    """The training on the cell's own noise, None for nothing, and that on the common task."""
    vocabulary = open_dataset(Path(setting.data)).vocabulary
    noises = [] if cell.objective == NOTHING else [noise_of(cell)]
    objectives = [objective_of(cell.architecture, n) for n in (*noises, VARIANTS[setting.probe])]
    specs = [
        shapes(o.framing(vocabulary, setting.length).spec(setting.batch_size)) for o in objectives
    ]
    positions = setting.length + max(spec["labels"].shape[1] for spec in specs)
    model = model_of_cell(cell, setting, vocabulary.size, positions)
    budgets = [*([setting.flops] if noises else []), setting.flops * setting.probe_share]
    runs = []
    for objective, spec, budget in zip(objectives, specs, budgets, strict=True):
        steps = max(2, round(budget / objective.flops(model, spec)))
        runs.append(
            Run(
                model=model,
                objective=objective,
                data=Data(layout=Blocks(), folder=setting.data),
                optimizer=AdamW(setting.learning_rate, b2=0.98, weight_decay=0.01, clip_norm=1.0),
                schedule=Cosine(warmup_steps=max(1, steps // 10), floor=0.1),
                phases=(Phase(steps=steps, length=setting.length, batch_size=setting.batch_size),),
                evaluations=(
                    FixedNoise(batch_size=setting.batch_size, max_rows=setting.eval_rows),
                ),
                checkpoints=Keeping(every_steps=steps),
                logging=Logging(every_steps=max(1, steps // 20), tensorboard=False),
                seeds=Seeds(init=setting.seed, order=setting.seed, noise=setting.seed),
            )
        )
    return (runs[0] if noises else None), runs[-1]


def shapes(spec: Mapping[str, ArraySpec]) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch as jax describes them."""
    return {name: jax.ShapeDtypeStruct(*array) for name, array in spec.items()}


def measure(cell: Cell, setting: Setting, folder: Path) -> Result:
    """Trains a cell, unless its folder says that it is done; restarts where it was left.

    Raises:
        UserError: the folder belongs to another setting, or a loss is not finite.
    """
    done = folder / "result.json"
    if done.is_file():
        kept = json.loads(done.read_text(encoding="utf-8"))
        if kept["setting"] != dataclasses.asdict(setting):
            raise UserError(f"{folder} was made with another setting: take another --output-dir")
        return Result(**kept["result"])
    started = time.monotonic()
    own_run, probe_run = runs_of(cell, setting)
    own: Mapping[str, float] = {}
    if own_run is not None:
        own = _trained(own_run, folder / "own", None)

    def learnt(run: Run) -> PyTree:
        return Checkpoints(folder / "own" / "checkpoints").restore_params()[0]

    probed = _trained(probe_run, folder / "probe", None if own_run is None else learnt)
    result = Result(
        parameters=_parameters(probe_run),
        steps=0 if own_run is None else int(own_run.phases[0].steps or 0),
        own_loss=own.get("validation/denoising"),
        own_accuracy=own.get("validation/denoising_accuracy"),
        probe_loss=probed["validation/denoising"],
        probe_accuracy=probed["validation/denoising_accuracy"],
        seconds=round(time.monotonic() - started, 1),
    )
    content = {"setting": dataclasses.asdict(setting), "result": result._asdict()}
    done.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return result


def _parameters(run: Run) -> int:
    model = model_of(functools.partial(run.objective.build, run.model))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.abstract()))


def _trained(
    run: Run, workdir: Path, initial: Callable[[Run], PyTree] | None
) -> Mapping[str, float]:
    if train(run, workdir, initial_params=initial, quiet=True) != 0:
        raise UserError(f"training in {workdir} did not come to its end: see its metrics.jsonl")
    rows = read_metrics(workdir / "metrics.jsonl")
    return next(row for row in reversed(rows) if "validation/denoising" in row)


def table(results: Mapping[Cell, Result], setting: Setting) -> str:
    """The results in Markdown, the best on the common task first."""
    lines = [
        "| architecture | objective | rate | span | parameters | steps "
        f"| loss on {setting.probe} | accuracy | own loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, result in ranked(results):
        numbers = ["" if x is None else f"{x:g}" for x in (cell.rate, cell.span)]
        own = "" if result.own_loss is None else f"{result.own_loss:.3f}"
        lines.append(
            f"| {cell.architecture} | {cell.objective} | {numbers[0]} | {numbers[1]} "
            f"| {result.parameters / 1e6:.2f} M | {result.steps:,} | {result.probe_loss:.3f} "
            f"| {result.probe_accuracy:.3f} | {own} |"
        )
    return "\n".join(lines) + "\n"


def ranked(results: Mapping[Cell, Result]) -> list[tuple[Cell, Result]]:
    """The best on the common task first."""
    return sorted(results.items(), key=lambda pair: pair[1].probe_loss)


_COLOURS: dict[str, str] = dict(
    zip(ARCHITECTURES, ("#3b6ea5", "#5aa17f", "#c98b2b", "#a5473b"), strict=True)
)


def picture(results: Mapping[Cell, Result], setting: Setting) -> str:
    """The results as SVG: a dot a cell at its loss on the common task, coloured by architecture."""
    order = ranked(results)
    losses = np.array([result.probe_loss for _, result in order])
    low, high = float(losses.min()), float(losses.max())
    spread = (high - low) or 1.0
    left, width, row, top = 280, 420, 22, 46
    height = top + row * len(order) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 90}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-size="14">Loss on {escape(setting.probe)} after '
        f"{setting.flops * (1 + setting.probe_share):.2g} FLOPs, nats a token</text>",
    ]
    for number, (cell, result) in enumerate(order):
        y = top + row * number + 12
        x = left + width * (result.probe_loss - low) / spread
        label = escape(cell.name.replace("_", " "))
        parts += [
            f'<text x="{left - 14}" y="{y + 4}" text-anchor="end">{label}</text>',
            f'<line x1="{left}" x2="{x:.1f}" y1="{y}" y2="{y}" stroke="#ddd"/>',
            f'<circle cx="{x:.1f}" cy="{y}" r="5" fill="{_COLOURS[cell.architecture]}"/>',
            f'<text x="{x + 10:.1f}" y="{y + 4}">{result.probe_loss:.3f}</text>',
        ]
    for number, (name, colour) in enumerate(_COLOURS.items()):
        x = 10 + 150 * number
        parts += [
            f'<circle cx="{x + 5}" cy="{height - 16}" r="5" fill="{colour}"/>',
            f'<text x="{x + 15}" y="{height - 12}">{escape(name)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def compare(
    cells: Iterable[Cell], setting: Setting, folder: Path, say: Callable[[str], None]
) -> dict[Cell, Result]:
    """Measures every cell, one after another; `say` hears of each."""
    results = {}
    for cell in cells:
        results[cell] = result = measure(cell, setting, folder / cell.name)
        say(f"{cell.name}: {result.probe_loss:.3f} ({result.seconds:.0f} s)")
    return results
