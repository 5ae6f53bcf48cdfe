"""Checkpoints on Orbax: saved beside the running steps, complete or not there at all.

A folder `<step>` holds Orbax trees `params` (nested, as in the model) and `training` (step,
optimizer state, key), and as Orbax's custom metadata what `Info` has. Orbax writes under another
name and renames at the end, so a killed save leaves nothing that looks whole. Orbax does not notice
changed bytes; checksums of the arrays, computed before the save and after the restore, do.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree
from orbax.checkpoint import v1 as ocp

from flaxpretrain import config
from flaxpretrain.errors import UserError
from flaxpretrain.locations import from_store, is_remote
from flaxpretrain.training.checksums import checksums
from flaxpretrain.training.faults import root_cause, storage_fault
from flaxpretrain.training.retention import Info, kept
from flaxpretrain.training.shelves import open_shelf
from flaxpretrain.training.state import TrainState, map_named, named_leaves

PARAMS, TRAINING = "params", "training"
INVENTORY = "files.json"
"""Sizes of a checkpoint's files, written once it is complete: damage is told at a glance."""

_ELSEWHERE = "another process could not read it"

CLOCK_EVERY = 50
"""Steps after which the processes of a pod ask the first one's clock."""


class _Damaged(Exception):
    """A checkpoint that cannot be read, and why."""


class _Misfit(Exception):
    """A sound checkpoint of other parameters than those asked for."""


class Checkpoints:
    """The checkpoints of one run in one folder.

    Reading never changes the folder. The first save tidies it: what a killed save left is removed,
    and a checkpoint found damaged is renamed `<step>.damaged`, never deleted.
    """

    def __init__(
        self,
        folder: Path | str,
        policy: config.Checkpoints | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """`policy` is needed for saving only; `say` takes warnings (default: standard error)."""
        self._shelf = open_shelf(folder)
        self.folder, self._path = self._shelf.folder, self._shelf.path
        self._policy = policy
        self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self._infos: dict[int, Info] = {}
        self._damaged: dict[int, str] = {}
        self._tidied = False
        self._pending: tuple[Any, threading.Event, Info] | None = None
        self._saved_at = time.monotonic()

    def steps(self) -> list[int]:
        """The steps of the checkpoints not known to be damaged, oldest first."""
        try:
            return sorted(step for step in self._shelf.steps() if step not in self._damaged)
        except Exception as error:
            if storage_fault(error) is None:
                raise
            raise self._unreadable(error) from error

    def regular(self) -> list[int]:
        """Those of the readable checkpoints that the clock had no part in, oldest first."""
        infos = [self._info(step) for step in self.steps()]
        return [info.step for info in infos if info is not None and not info.temporary]

    def latest(self) -> int | None:
        """The step of the newest checkpoint; it may yet turn out to be damaged."""
        return max(self.steps(), default=None)

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """What the newest readable checkpoint (or that of `step`) was saved with."""
        return dict(self._newest(step).metadata)

    def params_only(self) -> bool:
        """Whether the newest readable checkpoint has parameters but no optimizer state."""
        return self._newest(None).params_only

    def due(self, step: int) -> bool:
        """Whether the policy asks for a save now; to be asked once after every step."""
        policy = self._writing_policy()
        if step % policy.every_steps == 0:
            return True
        if policy.temporary_every_seconds is None:
            return False
        late = time.monotonic() - self._saved_at >= policy.temporary_every_seconds
        if jax.process_count() == 1:
            return late
        if step % CLOCK_EVERY:
            return False
        return bool(multihost_utils.broadcast_one_to_all(np.array(late)))

    def save(
        self,
        step: int,
        state: TrainState,
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        force: bool = False,
    ) -> None:
        """Starts to save; returns when the state may be overwritten.

        A step that has a checkpoint already is left as it is. `force` makes a checkpoint regular
        whose step is no multiple of `every_steps`; otherwise it is temporary.

        Raises:
            UserError: this save could not start, or the one before could not be written.
        """
        regular = force or step % self._writing_policy().every_steps == 0
        training = _training_leaves(state, jax.random.key_data(state.key))
        key_type = str(jax.random.key_impl(state.key))
        self._start(step, state.params, training, key_type, metadata, metrics or {}, not regular)

    def save_params(self, step: int, params: PyTree, metadata: Mapping[str, Any]) -> None:
        """Saves parameters without optimizer state, and waits until they are written."""
        self._start(step, params, {}, None, metadata, {}, temporary=False)
        self.wait()

    def restore(
        self, abstract: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any], int]:
        """The newest readable state (or that of `step`), its metadata and its step.

        Args:
            abstract: shapes, dtypes and shardings to restore to; the mesh may be another one than
                that of the save.
            step: of an older checkpoint.

        Raises:
            UserError: no checkpoint can be read, or it holds another model's state.
        """

        def load(info: Info) -> TrainState:
            if info.params_only:
                raise _Damaged("it has no optimizer state")
            data = jax.eval_shape(jax.random.key_data, abstract.key)
            data = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=abstract.key.sharding)
            wanted = _training_leaves(abstract, data)
            loaded = self._load(info, {PARAMS: _text_keys(abstract.params), TRAINING: wanted})
            params, training = named_leaves(loaded[PARAMS]), loaded[TRAINING]
            return TrainState(
                step=training["step"],
                params=map_named(lambda name, _: params[name], abstract.params),
                opt_state=map_named(lambda n, _: training[f"opt_state/{n}"], abstract.opt_state),
                key=jax.random.wrap_key_data(training["key"], impl=info.key_type),
            )

        return self._first_that_loads(load, step)

    def restore_params(
        self, abstract: PyTree = None, step: int | None = None
    ) -> tuple[PyTree, dict[str, Any], int]:
        """The parameters of the newest readable checkpoint, its metadata and its step.

        Without `abstract`, or where it has no shardings, they are numpy arrays in nested dicts,
        whatever mesh they came from.

        Raises:
            UserError: no checkpoint can be read, or it holds another model's parameters.
        """

        def load(info: Info) -> PyTree:
            wanted = abstract
            if wanted is None:
                stored: Any = ocp.checkpointables_metadata(self._path(info.step)).metadata
                wanted = jax.tree.map(_as_numpy, stored[PARAMS])
            wanted = jax.tree.map(lambda leaf: leaf if _placed(leaf) else _as_numpy(leaf), wanted)
            loaded = self._load(info, {PARAMS: _text_keys(wanted)})[PARAMS]
            if abstract is None:
                return _number_keys(loaded)
            params = named_leaves(loaded)
            return map_named(lambda name, _: params[name], abstract)

        return self._first_that_loads(load, step)

    def wait(self) -> None:
        """Waits until the last save is complete, then deletes what the policy does not keep.

        Raises:
            UserError: the save could not be written.
        """
        if self._pending is None:
            return
        response, listed, info = self._pending
        self._pending = None
        try:
            response.result()
        except Exception as error:  # Orbax wraps what the disk said in errors of many types
            raise self._failed_save(info.step, error) from error
        listed.wait()
        self._infos[info.step] = info
        self._damaged.pop(info.step, None)  # that one was set aside
        if self._policy is None or jax.process_index() != 0:
            return
        stay = kept([i for i in map(self._info, self.steps()) if i is not None], self._policy)
        for step in self.steps():
            # Unreadable ones are nobody's to delete.
            if step not in stay and step in self._infos:
                self._shelf.delete(step)

    def close(self) -> None:
        """Waits for the last save."""
        self.wait()

    def _writing_policy(self) -> config.Checkpoints:
        if self._policy is None:
            raise ValueError("these checkpoints were opened without a policy, for reading only")
        return self._policy

    def _failed_save(self, step: int, error: Exception) -> Exception:
        """A `UserError` where the disk or bucket is at fault; else the error itself."""
        reason = storage_fault(error)
        if reason is None:
            return error
        return UserError(
            f"the checkpoint of step {step} could not be written to {self.folder}: {reason}; make "
            "room or choose another folder, then run again: earlier checkpoints are whole"
        )

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(
            f"checkpoints in {self.folder} could not be read: {root_cause(error)}; look whether "
            "this machine may read them, then run again: nothing was changed"
        )

    def _start(
        self,
        step: int,
        params: PyTree,
        training: Mapping[str, Any],
        key_type: str | None,
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float],
        temporary: bool,
    ) -> None:
        self.wait()
        try:
            self._tidy()
            self._saved_at = time.monotonic()
            if step in self.steps():
                return
            if jax.process_index() == 0:
                self._shelf.clear(step)
            trees: dict[str, Any] = {PARAMS: _text_keys(params)}
            if training:
                trees[TRAINING] = dict(training)
            info = Info(step, metadata, metrics, temporary, checksums(_named(trees)), key_type)
            response = ocp.save_checkpointables_async(
                self._path(step), trees, custom_metadata=_to_json(info)
            )
        except Exception as error:
            raise self._failed_save(step, error) from error
        listed = threading.Event()
        self._pending = (response, listed, info)
        response.on_complete(lambda _: self._list_files(step, listed))

    def _list_files(self, step: int, listed: threading.Event) -> None:
        """Runs on Orbax's thread once the checkpoint has its final name."""
        try:
            if jax.process_index() == 0:
                sizes = _file_sizes(self._path(step))
                self._shelf.write(self._path(step) / INVENTORY, json.dumps(sizes))
        finally:
            listed.set()

    def _tidy(self) -> None:
        """Before a save: what nobody can be writing any more is put in order."""
        if jax.process_index() != 0:
            return
        if not self._tidied:
            self._tidied = True
            self._shelf.tidy()
        for step, reason in self._damaged.items():
            if note := self._shelf.set_aside(step, reason):
                self._say(f"warning: {note}")

    def _mark_damaged(self, step: int, reason: str) -> None:
        self._damaged[step] = reason
        self._infos.pop(step, None)
        if jax.process_index() == 0:
            self._say(
                f"warning: the checkpoint {self._path(step)} is damaged ({reason}); "
                "trying the one before"
            )

    def _check_store(self, damage: _Damaged) -> None:
        """Raises UserError where a bucket refused: that says nothing of what is in it."""
        cause = damage.__cause__
        if is_remote(str(self.folder)) and isinstance(cause, Exception) and from_store(cause):
            raise self._unreadable(cause) from damage

    def _info(self, step: int) -> Info | None:
        """What a checkpoint says about itself; None, and a warning, where it is damaged."""
        if step not in self._infos:
            try:
                self._infos[step] = _read_info(self._path(step), step)
            except _Damaged as damage:
                self._check_store(damage)
                self._mark_damaged(step, str(damage))
        return self._infos.get(step)

    def _readable(self, step: int | None) -> Iterator[Info]:
        """Checkpoints that look readable to all processes, newest first."""
        for candidate in reversed(self.steps()):
            if step not in (None, candidate):
                continue
            info = self._info(candidate)
            if _all_processes(info is not None) and info is not None:
                yield info
            elif info is not None:
                self._mark_damaged(candidate, _ELSEWHERE)

    def _newest(self, step: int | None) -> Info:
        for info in self._readable(step):
            return info
        raise self._none_readable(step)

    def _none_readable(self, step: int | None) -> UserError:
        which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        reasons = "; ".join(f"{s} is damaged: {r}" for s, r in sorted(self._damaged.items()))
        return UserError(f"{which} in {self.folder} can be read{': ' if reasons else ''}{reasons}")

    def _first_that_loads(
        self, load: Callable[[Info], Any], step: int | None
    ) -> tuple[Any, dict[str, Any], int]:
        for info in self._readable(step):
            result, problem = None, ""
            try:
                result = load(info)
            except _Misfit as misfit:
                raise UserError(str(misfit)) from misfit
            except _Damaged as damage:
                self._check_store(damage)
                problem = str(damage)
            if _all_processes(not problem):
                return result, dict(info.metadata), info.step
            self._mark_damaged(info.step, problem or _ELSEWHERE)
        raise self._none_readable(step)

    def _load(self, info: Info, wanted: dict[str, PyTree]) -> dict[str, PyTree]:
        path = self._path(info.step)
        _check_fit(path, wanted)
        try:
            loaded = ocp.load_checkpointables(path, wanted)
        except Exception as error:  # Orbax wraps whatever went wrong in errors of many types
            raise _Damaged(root_cause(error)) from error
        for name, value in checksums(_named(loaded)).items():
            if info.checksums.get(name) != value:
                raise _Damaged(f"the values of {name} are not those that were saved")
        return loaded


def restore_params(folder: Path | str) -> tuple[PyTree, dict[str, Any], int]:
    """Parameters as nested dicts of numpy arrays, metadata and step, for tools.

    Raises:
        UserError: the folder has no readable checkpoint.
    """
    return Checkpoints(folder).restore_params()


def _named(trees: Mapping[str, PyTree]) -> dict[str, Array | np.ndarray]:
    return named_leaves(dict(trees))


def _training_leaves(state: TrainState, key_data: Any) -> dict[str, Any]:
    """All but the parameters, by name: no optimizer class is needed to read them."""
    return named_leaves({"step": state.step, "opt_state": state.opt_state, "key": key_data})


def _placed(leaf: Any) -> bool:
    return getattr(leaf, "sharding", None) is not None


def _as_numpy(leaf: Any) -> np.ndarray:
    """What asks Orbax for a numpy array; its memory is never touched."""
    return np.empty(leaf.shape, leaf.dtype)


def _text_keys(tree: PyTree) -> PyTree:
    if not isinstance(tree, Mapping):
        return tree
    return {str(key): _text_keys(value) for key, value in tree.items()}


def _number_keys(tree: PyTree) -> PyTree:
    if not isinstance(tree, Mapping):
        return tree
    return {int(k) if k.isdigit() else k: _number_keys(v) for k, v in tree.items()}


def _to_json(info: Info) -> dict[str, Any]:
    return {
        "metadata": dict(info.metadata),
        "metrics": {name: float(value) for name, value in info.metrics.items()},
        "temporary": info.temporary,
        "checksums": dict(info.checksums),
        "key_type": info.key_type,
    }


def _read_info(path: epath.Path, step: int) -> Info:
    """Raises _Damaged on what cannot be a whole checkpoint."""
    inventory = path / INVENTORY
    if inventory.exists():
        _check_files(path, inventory)
    try:
        data: Any = ocp.checkpointables_metadata(path).custom_metadata
        return Info(step=step, **data)
    except Exception as error:  # Orbax wraps whatever went wrong in errors of many types
        raise _Damaged(root_cause(error)) from error


def _check_files(path: epath.Path, inventory: epath.Path) -> None:
    try:
        expected = json.loads(inventory.read_text())
    except ValueError as error:
        raise _Damaged(f"{INVENTORY} is not JSON") from error
    found = _file_sizes(path)
    for name, size in expected.items():
        if name not in found:
            raise _Damaged(f"{name} is missing")
        if found[name] != size:
            raise _Damaged(f"{name} has {found[name]} bytes instead of {size}")


def _file_sizes(folder: epath.Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for path in folder.iterdir():
        if path.is_dir():
            sizes |= {f"{path.name}/{name}": size for name, size in _file_sizes(path).items()}
        elif not path.name.startswith(INVENTORY):
            sizes[path.name] = path.stat().length
    return sizes


def _check_fit(path: epath.Path, wanted: Mapping[str, PyTree]) -> None:
    """Raises _Misfit where shapes or dtypes differ, _Damaged where they cannot be read."""
    stored_trees = ocp.checkpointables_metadata(path).metadata
    for name in wanted:
        # Orbax leaves out a tree whose description it cannot read.
        if not stored_trees.get(name):
            raise _Damaged(f"what the arrays of {name} are cannot be read")
    stored = named_leaves({name: stored_trees.get(name, {}) for name in wanted})
    asked = named_leaves(dict(wanted))
    lines = []
    for name in sorted(stored.keys() | asked.keys()):
        have, want = (
            "nothing" if leaf is None else f"{np.dtype(leaf.dtype)}{tuple(leaf.shape)}"
            for leaf in (stored.get(name), asked.get(name))
        )
        if have != want:
            lines.append(f"{name} is {have} there and {want} here")
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise _Misfit(
            f"the checkpoint {path} is of another model or optimizer: {'; '.join(lines[:3])}{more}"
        )


def _all_processes(good: bool) -> bool:
    if jax.process_count() == 1:
        return good
    return bool(np.all(multihost_utils.process_allgather(np.array(good))))
