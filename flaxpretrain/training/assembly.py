"""A run put together on a mesh: model, optimizer, shardings and jitted steps.

It needs no dataset and no device memory, so that plans, benchmarks and compiles for absent
hardware share it with the training loop.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from flaxpretrain.config import Phase, Run
from flaxpretrain.data.framing import Framing
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError
from flaxpretrain.hardware import has_flash_attention, peak_of
from flaxpretrain.models import attention, quantization
from flaxpretrain.models.functional import REMAT_POLICIES, Execution, Model, model_of
from flaxpretrain.training import sharding
from flaxpretrain.training.guard import guard_of, guarded
from flaxpretrain.training.loss_scale import LossScaling, loss_scaled
from flaxpretrain.training.optimizers import make_optimizer
from flaxpretrain.training.state import TrainState
from flaxpretrain.training.step import check_divisible, make_eval_step, make_train_step

STAND_IN_SENTINELS = 100
"""As many as T5's tokenizer has."""

REMATS = ("auto", "save_all", *REMAT_POLICIES)
"""What a run may say of rematerialisation: policies by name, and two that depend on its layers."""


@dataclasses.dataclass(frozen=True)
class Assembly:
    """The parts of a run that depend on the mesh and on how many steps there are."""

    run: Run
    mesh: Mesh
    model: Model
    optimizer: optax.GradientTransformationExtraArgs
    state: TrainState
    """Abstract: ShapeDtypeStructs that carry their shardings."""
    execution: Execution
    update_shardings: PyTree[NamedSharding] | None = None
    """Where updates are computed, if not where their parameters lie."""

    @property
    def compute_dtype(self) -> Any:
        """The number format of the forward and backward pass."""
        return jnp.dtype(self.run.precision.compute)

    def initial_state(self) -> TrainState:
        """The state before the first step, created on the devices that hold it."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        make = functools.partial(_initial_state, self.run, self.model, self.optimizer)
        return jax.jit(make, out_shardings=shardings)()

    def train_step(
        self, phase: Phase, options: Mapping[str, int] | None = None
    ) -> Callable[[TrainState, PyTree], tuple[TrainState, Any]]:
        """The jitted train step of a phase, with options for its compiler; the state is donated."""
        check_divisible(phase.batch_size, phase.microbatches, self.mesh)
        check_remat(self.run)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        step = make_train_step(
            self.run.objective,
            self.model,
            self.optimizer,
            self.mesh,
            shardings.params,
            microbatches=phase.microbatches,
            compute_dtype=self.compute_dtype,
            reduce_dtype=jnp.dtype(self.run.precision.reduce),
            execution=self.execution,
            update_shardings=self.update_shardings,
        )
        return jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(shardings, NamedSharding(self.mesh, P())),
            compiler_options=dict(options) if options else None,
        )

    def eval_step(self, objective: Any = None) -> Callable[[PyTree, PyTree], Any]:
        """The jitted evaluation step, of the run's objective unless another is given."""
        step = make_eval_step(
            objective or self.run.objective,
            self.model,
            compute_dtype=self.compute_dtype,
            execution=self.execution,
        )
        return jax.jit(step, out_shardings=NamedSharding(self.mesh, P()))

    def batch_spec(self, phase: Phase, vocabulary: Vocabulary) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a global batch, with their shardings."""
        framing = framing_of(self.run, vocabulary, phase.length)
        rows = sharding.batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
            for name, (shape, dtype) in framing.spec(phase.batch_size).items()
        }

    @property
    def peak_flops_per_second(self) -> float | None:
        """What a device does at best in the number formats of the run; None where it is unknown."""
        peak = peak_of(self.mesh.devices.flat[0].device_kind)
        return None if peak is None else peak.of_step(self.run.precision.matmul)

    def flops_per_step(self, phase: Phase, vocabulary: Vocabulary) -> float:
        """Model FLOPs of one training step over all devices, by the architecture's formula."""
        spec = self.batch_spec(phase, vocabulary)
        return float(self.run.objective.flops(self.run.model, spec))


def assemble(run: Run, mesh: Mesh, total_steps: int) -> Assembly:
    """Puts a run together on a mesh.

    Raises:
        UserError: the objective needs what the model lacks, or parameters do not fit the mesh.
    """
    model = model_of(functools.partial(run.objective.build, run.model))
    check_interface(run, model)
    check_batch(run)
    check_context(run, mesh)
    check_matmul(run, mesh.devices.flat[0])
    abstract_params = model.abstract()
    optimizer = make_optimizer(
        run.optimizer, run.schedule, total_steps, abstract_params, groups=run.objective.groups
    )
    guard = guard_of(run)
    if guard is not None:
        optimizer = guarded(optimizer, guard)
    if run.precision.compute == "float16":
        optimizer = loss_scaled(optimizer, LossScaling())
    make = functools.partial(_initial_state, run, model, optimizer)
    abstract = jax.eval_shape(make)
    rules = (*run.objective.sharding, *getattr(run.model, "sharding", ()))
    splits = run.mesh.shard_optimizer
    shardings = sharding.state_shardings(abstract, rules, mesh, shard_optimizer=splits)
    updates = sharding.update_shardings(abstract_params, rules, mesh, shard_optimizer=True)
    state = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        abstract,
        shardings,
    )
    execution = Execution(
        attention=attention_backend(run, mesh.devices.flat[0]),
        remat=remat_policy(run),
        scan=run.scan_layers,
        matmul=run.precision.matmul,
        platform=mesh.devices.flat[0].platform,
    )
    return Assembly(run, mesh, model, optimizer, state, execution, updates if splits else None)


def remat_policy(run: Run) -> str:
    """The policy by which layers are traced: `auto` rematerialises where a scan would stack all.

    Raises:
        UserError: an unknown policy.
    """
    if run.remat not in REMATS:
        raise UserError(f"remat: expected one of {', '.join(REMATS)}; got {run.remat!r}")
    chosen = {"auto": "dots" if run.scan_layers else "none", "save_all": "none"}
    return chosen.get(run.remat, run.remat)


def check_remat(run: Run) -> None:
    """Raises UserError where a scan would save everything unasked; for training alone.

    A pass without gradients saves nothing, so that workdirs of older versions can be read.
    """
    if remat_policy(run) == "none" and run.scan_layers and run.remat != "save_all":
        raise UserError(
            "remat none with scan_layers: a scan stacks all that the backward pass reads of every "
            "layer, which takes more memory than unrolled layers do: choose remat=dots or "
            "remat=full, or scan_layers=false, or ask for it with remat=save_all"
        )


def attention_backend(run: Run, device: Any) -> str:
    """The fastest attention that can do what the run asks for on this device of jax."""
    if run.attention != "auto":
        if run.attention not in attention.BACKENDS:
            raise UserError(
                f"attention must be auto or one of {', '.join(attention.BACKENDS)}; got "
                f"{run.attention!r}"
            )
        return run.attention
    if device.platform == "cpu":
        return "cpu"
    if getattr(run.model, "attention_dropout_rate", 0.0) > 0:
        return "xla"  # the flash kernels have no dropout
    if device.platform == "gpu" and (
        # cuDNN's flash attention takes 16-bit numbers only.
        run.precision.compute == "float32" or not has_flash_attention(device.device_kind)
    ):
        return "xla"
    return {"tpu": "rows", "gpu": "cudnn"}.get(device.platform, "xla")


def check_matmul(run: Run, device: Any) -> None:
    """Raises UserError where products in 8 bits lack their package, or a device of jax has none.

    A device whose peak is not known computes them somehow, as a CPU does.
    """
    peak = peak_of(device.device_kind)
    if peak is not None:
        peak.of_step(run.precision.matmul)
    if run.precision.matmul != "default":
        quantization.library()


def check_interface(run: Run, model: Model) -> None:
    """Raises UserError when the model lacks a method that the objective calls."""
    module = model.bind(model.abstract())
    missing = [name for name in run.objective.requires if not hasattr(module, name)]
    if missing:
        raise UserError(
            f"{type(run.objective).__name__} needs a model with {', '.join(missing)}, which "
            f"{type(run.model).__name__} does not build: choose another model or objective"
        )


def framing_of(run: Run, vocabulary: Vocabulary, length: int) -> Framing:
    """What frames the run's rows: the objective's framing, as the layout has it."""
    return run.data.layout.framing(run.objective.framing(vocabulary, length))


def check_batch(run: Run) -> None:
    """Raises UserError when the layout does not make arrays that the objective reads."""
    wanted = getattr(run.objective, "reads", ())
    if not wanted:
        return
    spec = framing_of(run, stand_in_vocabulary(run), run.phases[0].length).spec(1)
    missing = [name for name in wanted if name not in spec]
    if missing:
        raise UserError(
            f"{type(run.objective).__name__} reads {', '.join(missing)}, which data.layout "
            f"{type(run.data.layout).__name__} does not make: use SentencePairs() for pairs of "
            "sentences"
        )


def check_context(run: Run, mesh: Mesh) -> None:
    """Raises UserError when rows cannot be cut into equal parts over the mesh's `context`."""
    parts = mesh.shape.get("context", 1)
    for length in {phase.length for phase in run.phases} if parts > 1 else ():
        for name, (shape, _) in framing_of(run, stand_in_vocabulary(run), length).spec(1).items():
            if name.endswith("segment_ids") and shape[1] % parts:
                raise UserError(
                    f"{name} of {shape[1]} positions are not divisible by mesh context = {parts}: "
                    "change the mesh, the phase's length or objective.target_length"
                )


def _initial_state(run: Run, model: Model, optimizer: Any) -> TrainState:
    params = model.init(jax.random.key(run.seeds.init))
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key(run.seeds.dropout),
    )


def stand_in_vocabulary(run: Run) -> Vocabulary:
    """A vocabulary of the model's size, for plans made where there is no dataset."""
    size = run.model.vocab_size
    sentinels = min(STAND_IN_SENTINELS, size // 2)
    return Vocabulary(
        size=size,
        pad=0,
        unk=1,
        cls=2,
        sep=3,
        mask=4,
        bos=2,
        eos=3,
        sentinels=tuple(range(size - 1, size - 1 - sentinels, -1)),
    )


def random_batch(
    spec: Mapping[str, jax.ShapeDtypeStruct], framing: Any, seed: int = 0
) -> dict[str, np.ndarray]:
    """A batch of full rows of random ids, framed and noised as real ones are."""
    rows = next(iter(spec.values())).shape[0]
    room = framing.room()
    shape = (rows, room.capacity)
    kinds = room.full().astype(np.int32)
    regular = framing.vocabulary.regular_ids()
    generator = np.random.default_rng(seed)
    ids = regular[generator.integers(0, len(regular), shape)].astype(np.int32)
    keys = generator.integers(0, 2**63, rows).astype(np.uint64)
    return framing.examples(
        {
            "ids": ids,
            "word_starts": np.ones(shape, bool),
            "sentence_starts": np.zeros(shape, bool),
            "piece_lengths": kinds[np.arange(rows) % len(kinds)],
        },
        keys,
        0,
    )
