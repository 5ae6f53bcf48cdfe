"""The flags `--data-dir --model-name --hparams` of google-research/electra as a run.

Names, defaults and values are the original's, with the recipes of all three sizes alive: there,
`"model_size": "base"` silently keeps the rows, batch, rate and generator of the small one.

Reference: google-research/electra configure_pretraining.py and util/training_utils.py.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.rows import Documents
from flaxpretrain.data.segments import recorded_layout
from flaxpretrain.data.store import METADATA_FILE, Dataset, open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.models.electra import ElectraConfig
from flaxpretrain.objectives.detection import Contrast, Detect
from flaxpretrain.objectives.generators import (
    Generator,
    Sampling,
    Scaled,
    Sized,
    TwoTower,
    Uniform,
)
from flaxpretrain.objectives.masked_lm import MaskedLM
from flaxpretrain.objectives.objective import Objective
from flaxpretrain.objectives.replaced_tokens import ReplacedTokens
from flaxpretrain.objectives.sharing import Sharing, Tied, Untied, Whole
from flaxpretrain.overrides import coerce, nearest
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import WarmupTimesDecay

SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 256, "num_hidden_layers": 12},
    "base": {"hidden_size": 768, "num_hidden_layers": 12},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24},
}

SIZE_DEFAULTS: dict[str, dict[str, Any]] = {
    "small": {"embedding_size": 128},
    "base": {
        "max_seq_length": 512,
        "train_batch_size": 256,
        "learning_rate": 2e-4,
        "generator_hidden_size": 0.33333,
        "num_train_steps": 766_000,
    },
    "large": {
        "max_seq_length": 512,
        "train_batch_size": 2048,
        "learning_rate": 2e-4,
        "mask_prob": 0.25,
        "num_train_steps": 400_000,
    },
}
"""What differs from `HParams` by size: the commented block of the original, and the paper."""

DEBUG: dict[str, Any] = {
    "train_batch_size": 8,
    "num_train_steps": 20,
    "eval_batch_size": 4,
    "num_eval_steps": 2,
}
_DEBUG_NETWORK = {
    "hidden_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 576,
}

_WITHOUT_EFFECT = {
    "do_lower_case": "the vocabulary's tokenizer knows its case",
    "iterations_per_loop": "figures are read one step late, and no loop waits for them",
    "use_tpu": "jax takes the TPU that is there",
    "num_tpu_cores": "jax takes all cores that are there",
    "tpu_job_name": "jax finds the TPU",
    "tpu_name": "jax finds the TPU",
    "tpu_zone": "jax finds the TPU",
    "gcp_project": "jax finds the TPU",
}
"""Names that are taken and do nothing, and why."""

MODEL_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
)
"""Names in `model_hparam_overrides`, those of the original's BertConfig."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """The original's names and defaults, those of electra-small."""

    model_size: str = "small"
    debug: bool = False
    do_train: bool = True
    do_eval: bool = False
    electra_objective: bool = True
    electric_objective: bool = False
    gen_weight: float = 1.0
    disc_weight: float = 50.0
    mask_prob: float = 0.15
    learning_rate: float = 5e-4
    lr_decay_power: float = 1.0
    weight_decay_rate: float = 0.01
    num_warmup_steps: int = 10_000
    iterations_per_loop: int = 200
    save_checkpoints_steps: int = 1000
    num_train_steps: int = 1_000_000
    num_eval_steps: int = 100
    keep_checkpoint_max: int = 5
    model_hparam_overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    embedding_size: int | None = None
    vocab_size: int = 30522
    do_lower_case: bool = True
    uniform_generator: bool = False
    two_tower_generator: bool = False
    untied_generator_embeddings: bool = False
    untied_generator: bool = True
    generator_layers: float = 1.0
    generator_hidden_size: float = 0.25
    disallow_correct: bool = False
    temperature: float = 1.0
    max_seq_length: int = 128
    train_batch_size: int = 128
    eval_batch_size: int = 128
    use_tpu: bool = False
    num_tpu_cores: int = 1
    tpu_job_name: str | None = None
    tpu_name: str | None = None
    tpu_zone: str | None = None
    gcp_project: str | None = None

    def __post_init__(self) -> None:
        """Raises UserError on values that cannot be, or that there is nothing for here."""
        if not (self.do_train or self.do_eval):
            raise UserError("--hparams: do_train and do_eval are both false: nothing to do")
        towers = [n for n in ("electric_objective", "two_tower_generator") if getattr(self, n)]
        if not towers:
            return
        if not (self.electra_objective or self.electric_objective):
            raise UserError(
                "--hparams: two_tower_generator needs electra_objective or electric_objective; "
                "both are false"
            )
        if self.uniform_generator or not self.untied_generator:
            other = "uniform_generator" if self.uniform_generator else "untied_generator"
            raise UserError(
                f"--hparams: {towers[0]} needs two towers of their own: leave {other} out"
            )


def read_hparams(text: str) -> HParams:
    """The hparams in a JSON text, or in the file whose path ends in .json.

    Precedence, as in the original: what is given, then `debug`, then the size, then the defaults.

    Raises:
        UserError: no JSON object, an unknown name, or a value of another type.
    """
    source = "--hparams"
    if text.endswith(".json"):
        source = f"--hparams {text}"
        try:
            text = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{source} cannot be read ({error.strerror})") from error
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{source} is no JSON ({error}): write {{}} or a path to a .json"
        ) from error
    if not isinstance(given, dict):
        raise UserError(f"{source}: expected an object such as {{}}; got {type(given).__name__}")
    known = [field.name for field in dataclasses.fields(HParams)]
    defaults = HParams()
    values = {}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{source}: unknown hparam {name!r}{nearest(name, known)}")
        values[name] = coerce(defaults, name, value, f"{source}: {name}")
    size = values.get("model_size", defaults.model_size)
    if size not in SIZES:
        raise UserError(f"{source}: model_size must be one of {', '.join(SIZES)}; got {size!r}")
    debug = DEBUG if values.get("debug") else {}
    return HParams(**{**SIZE_DEFAULTS[size], **debug, **values})


def notes_of(text: str) -> list[str]:
    """A line for each hparam given that does nothing here."""
    given = given_object(text)
    return [
        f"hparams: {name} has no effect here: {reason}"
        for name, reason in _WITHOUT_EFFECT.items()
        if name in given
    ]


def run_of(hparams: HParams, name: str, data_dir: Path | None = None) -> Run:
    """The run that these hparams describe, on the dataset in `data_dir`.

    Raises:
        UserError: sizes that do not fit each other.
    """
    steps = hparams.num_train_steps
    folder = None if data_dir is None else dataset_in(data_dir)
    dataset = None if folder is None else _dataset(folder)
    # One document cannot be held out; the original evaluates on its training rows always.
    split = "validation" if dataset is None or "validation" in dataset.splits else "train"
    evaluation = FixedNoise(
        name=split,
        split=split,
        batch_size=hparams.eval_batch_size,
        max_rows=hparams.num_eval_steps * hparams.eval_batch_size,
    )
    return Run(
        name=name,
        model=model_of(hparams),
        objective=objective_of(hparams),
        data=Data(layout=_layout(dataset), folder=None if folder is None else str(folder)),
        optimizer=AdamW(
            hparams.learning_rate,
            weight_decay=hparams.weight_decay_rate,
            eps=1e-6,
            clip_norm=1.0,
            bias_correction=False,
        ),
        schedule=WarmupTimesDecay(
            warmup_steps=hparams.num_warmup_steps, power=hparams.lr_decay_power
        ),
        guard=Guard(),
        phases=(
            Phase(steps=steps, length=hparams.max_seq_length, batch_size=hparams.train_batch_size),
        ),
        precision=Precision(compute="float32"),
        remat="save_all",
        evaluations=(evaluation,),
        checkpoints=Checkpoints(
            every_steps=hparams.save_checkpoints_steps, keep_last=hparams.keep_checkpoint_max
        ),
    )


def dataset_in(data_dir: Path) -> Path:
    """The dataset's folder: `data_dir`, or pretrain_tfrecords in it, where the original looks."""
    below = data_dir / "pretrain_tfrecords"
    is_below = not (data_dir / METADATA_FILE).is_file() and (below / METADATA_FILE).is_file()
    return below if is_below else data_dir


def _dataset(folder: Path) -> Dataset | None:
    """The dataset in a folder, where there is one yet."""
    return open_dataset(folder) if (folder / METADATA_FILE).is_file() else None


def _layout(dataset: Dataset | None) -> Any:
    """Documents packed whole, or what `--compat` asked for when the dataset was built."""
    return Documents() if dataset is None else recorded_layout(dataset) or Documents()


def model_of(hparams: HParams) -> ElectraConfig:
    """The discriminator: heads of 64, feed-forward four times the width, unless overridden.

    Raises:
        UserError: an unknown name in model_hparam_overrides, or a value of another type.
    """
    sizes = _DEBUG_NETWORK if hparams.debug else SIZES[hparams.model_size]
    changes = {}
    default = ElectraConfig()
    for name, value in hparams.model_hparam_overrides.items():
        where = f"--hparams: model_hparam_overrides.{name}"
        if name not in MODEL_FIELDS:
            raise UserError(f"{where} is unknown{nearest(name, MODEL_FIELDS)}")
        changes[name] = coerce(default, name, value, where)
    sizes = {**sizes, **changes}
    hidden = sizes["hidden_size"]
    derived = {"num_attention_heads": max(1, hidden // 64), "intermediate_size": 4 * hidden}
    return ElectraConfig(
        vocab_size=hparams.vocab_size,
        embedding_size=hparams.embedding_size or hidden,
        **{**derived, **sizes},
    )


def objective_of(hparams: HParams) -> Objective:
    """ELECTRA, Electric, or BERT's masked LM of the original's masks where both are false."""
    masking = TokenMasking(
        rate=hparams.mask_prob, count="electra", mask_share=0.85, random_share=0.0
    )
    if not (hparams.electra_objective or hparams.electric_objective):
        return MaskedLM(masking=masking)
    sharing: Sharing = Untied() if hparams.untied_generator_embeddings else Tied()
    generator: Generator = generator_of(hparams)
    if hparams.uniform_generator:
        generator = Uniform()
    elif hparams.two_tower_generator or hparams.electric_objective:
        generator = TwoTower(tower=generator)
    elif not hparams.untied_generator:
        # As there, the generator's sizes then do not matter: it is the discriminator.
        sharing, generator = Whole(), Scaled(width=1.0)
    return ReplacedTokens(
        masking=masking,
        generator=generator,
        sharing=sharing,
        sampling=Sampling(
            temperature=hparams.temperature, disallow_correct=hparams.disallow_correct
        ),
        task=Contrast() if hparams.electric_objective else Detect(),
        terms={"masked_lm": hparams.gen_weight, "discriminator": hparams.disc_weight},
    )


def generator_of(hparams: HParams) -> Scaled | Sized:
    """A generator of the original's sizes: the discriminator's fractions where those are the same.

    There, a generator has heads of 64 units and a feed-forward part four times its width, whatever
    model_hparam_overrides say of the discriminator; where such heads do not divide the width,
    which stops the original, the fractions are taken.

    Reference: google-research/electra run_pretraining.py, get_generator_config.
    """
    model = model_of(hparams)
    scaled = Scaled(width=hparams.generator_hidden_size, depth=hparams.generator_layers)
    width = round(hparams.generator_hidden_size * model.hidden_size)
    sized = Sized(
        hidden_size=width,
        num_hidden_layers=max(1, round(hparams.generator_layers * model.num_hidden_layers)),
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
    )
    fractions = scaled.config(model)
    same = all(getattr(fractions, name) == size for name, size in dataclasses.asdict(sized).items())
    return scaled if same or width % max(1, width // 64) else sized


def given_object(text: str) -> dict[str, Any]:
    """The object in a JSON text, or in the file whose path ends in .json."""
    return json.loads(Path(text).read_text(encoding="utf-8") if text.endswith(".json") else text)
