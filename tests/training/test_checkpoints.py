"""Checkpoints: complete, restorable on any mesh, never half there, damage named."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain import config
from flaxpretrain.errors import UserError
from flaxpretrain.training.checkpoints import Checkpoints, restore_params
from flaxpretrain.training.checksums import checksums
from flaxpretrain.training.guard import Guard, guarded
from flaxpretrain.training.optimizers import AdamW, make_optimizer
from flaxpretrain.training.retention import Info, kept
from flaxpretrain.training.schedules import Constant
from flaxpretrain.training.sharding import make_mesh, state_shardings
from flaxpretrain.training.state import TrainState, named_leaves
from tests.training.toys import random_tree

ROOT = Path(__file__).parents[2]
METADATA = {"run": {"class": "x.Y", "phases": [{"steps": 5}]}, "format": 1, "dataset": None}


def optimizer():
    return guarded(make_optimizer(AdamW(0.1), Constant(), 10, random_tree(0)), Guard(window=4))


def initial(seed: int = 0) -> TrainState:
    params = random_tree(seed)
    return TrainState(jnp.int32(0), params, optimizer().init(params), jax.random.key(seed))


def on_mesh(data: int, fsdp: int, tensor: int) -> TrainState:
    """The abstract state with the default shardings of a mesh of fake devices."""
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = make_mesh(data, fsdp, tensor, devices)
    abstract = jax.eval_shape(initial)
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        abstract,
        state_shardings(abstract, (), mesh),
    )


def make_state(abstract: TrainState, seed: int = 0) -> TrainState:
    return jax.device_put(initial(seed), jax.tree.map(lambda leaf: leaf.sharding, abstract))


def at_step(state: TrainState, step: int) -> TrainState:
    """The state with its step, and parameters that tell it."""
    shifted = jax.tree.map(lambda p: p + np.float32(step), state.params)
    return state._replace(step=jnp.full_like(state.step, step), params=shifted)


def bits(state) -> dict[str, np.ndarray]:
    plain = state._replace(key=jax.random.key_data(state.key))
    return {name: np.asarray(leaf) for name, leaf in named_leaves(plain).items()}


def assert_same(a: TrainState, b: TrainState) -> None:
    left, right = bits(a), bits(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype and value.tobytes() == right[name].tobytes(), name


def open_folder(folder: Path, **policy) -> tuple[Checkpoints, list[str]]:
    lines: list[str] = []
    return Checkpoints(folder, config.Checkpoints(**policy), lines.append), lines


def save_steps(folder: Path, *steps: int, **policy) -> None:
    checkpoints, _ = open_folder(folder, **({"every_steps": 1, "keep_last": 10} | policy))
    for step in steps:
        checkpoints.save(step, at_step(initial(), step), METADATA | {"step": step})
    checkpoints.close()


def placed_here() -> TrainState:
    return on_mesh(1, 1, 1)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (1, 4, 2), (1, 1, 1)])
def test_a_state_saved_on_one_mesh_is_restored_bit_for_bit_on_another(tmp_path, sizes):
    state = make_state(on_mesh(2, 2, 2), seed=3)
    checkpoints, _ = open_folder(tmp_path)
    checkpoints.save(7, state, METADATA, force=True)
    checkpoints.close()
    target = on_mesh(*sizes)
    with jax.set_mesh(target.step.sharding.mesh):
        restored, metadata, step = open_folder(tmp_path)[0].restore(target)
    assert (metadata, step) == (METADATA, 7)
    assert_same(restored, state)
    wanted = jax.tree.leaves(jax.tree.map(lambda leaf: leaf.sharding, target))
    assert [leaf.sharding for leaf in jax.tree.leaves(restored)] == wanted
    assert type(restored.opt_state) is type(state.opt_state)
    np.testing.assert_array_equal(
        jax.random.bits(restored.key, (4,)), jax.random.bits(state.key, (4,))
    )


def test_saving_does_not_see_what_later_steps_do_to_donated_buffers(tmp_path):
    state = make_state(placed_here())
    expected = bits(state)
    checkpoints, _ = open_folder(tmp_path)
    step = jax.jit(
        lambda s: s._replace(params=jax.tree.map(lambda p: p * 2, s.params)), donate_argnums=0
    )
    checkpoints.save(1, state, METADATA, force=True)
    for _ in range(10):
        state = step(state)
    checkpoints.wait()
    restored, _, _ = checkpoints.restore(placed_here())
    for name, value in bits(restored).items():
        np.testing.assert_array_equal(value, expected[name])


def test_tools_read_parameters_as_numpy_without_the_mesh_of_training(tmp_path):
    state = make_state(on_mesh(2, 2, 2), seed=5)
    checkpoints, _ = open_folder(tmp_path)
    checkpoints.save(2, state, METADATA, force=True)
    checkpoints.close()
    params, metadata, step = restore_params(tmp_path)
    assert step == 2 and metadata == METADATA
    for name, value in named_leaves(params).items():
        assert type(value) is np.ndarray
        np.testing.assert_array_equal(value, named_leaves(state.params)[name])


def test_parameters_alone_start_a_run_and_say_so(tmp_path):
    params = {"layers": {0: {"w": jnp.ones((2, 3))}}, "b": jnp.zeros(2)}
    checkpoints, _ = open_folder(tmp_path)
    checkpoints.save_params(0, params, METADATA)
    assert checkpoints.params_only() and checkpoints.latest() == 0
    restored, _, _ = restore_params(tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    abstract = jax.eval_shape(lambda: params)
    placed, _, _ = Checkpoints(tmp_path).restore_params(abstract)
    np.testing.assert_array_equal(placed["layers"][0]["w"], params["layers"][0]["w"])
    with pytest.raises(UserError, match="no optimizer state"):
        open_folder(tmp_path)[0].restore(placed_here())


def test_metadata_and_older_steps_can_be_asked_for(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    checkpoints, _ = open_folder(tmp_path)
    assert checkpoints.steps() == [1, 2, 3] and checkpoints.latest() == 3
    assert checkpoints.metadata()["step"] == 3 and checkpoints.metadata(1)["step"] == 1
    restored, _, step = checkpoints.restore(placed_here(), step=2)
    assert step == 2
    assert_same(restored, at_step(initial(), 2))


def test_a_folder_without_checkpoints(tmp_path):
    checkpoints, _ = open_folder(tmp_path / "absent")
    assert checkpoints.latest() is None
    with pytest.raises(UserError, match="no checkpoint in .*absent can be read"):
        checkpoints.restore(placed_here())
    assert not (tmp_path / "absent").exists()


def test_another_models_checkpoint_is_no_damage_but_a_mistake(tmp_path):
    save_steps(tmp_path, 1)
    abstract = placed_here()
    kernel = abstract.params["head"]["kernel"]
    abstract.params["head"]["kernel"] = jax.ShapeDtypeStruct(
        (8, 9), kernel.dtype, sharding=kernel.sharding
    )
    checkpoints, lines = open_folder(tmp_path)
    message = r"params/head/kernel is float32\(8, 8\) there and float32\(8, 9\) here"
    with pytest.raises(UserError, match=message):
        checkpoints.restore(abstract)
    assert lines == []


# Damage.


def test_damage_found_after_a_save_is_set_aside_too_and_its_step_saved_again(tmp_path):
    checkpoints, lines = open_folder(tmp_path, every_steps=1, keep_last=10)
    for step in (1, 2):
        checkpoints.save(step, at_step(initial(), step), METADATA)
    checkpoints.wait()
    truncate(tmp_path / "2")
    assert checkpoints.restore(placed_here())[2] == 1  # as a rewind does
    checkpoints.save(2, at_step(initial(1), 2), METADATA)
    checkpoints.wait()
    assert (tmp_path / "2.damaged").exists() and "moved the damaged" in lines[-1]
    restored, _, step = checkpoints.restore(placed_here())
    assert step == 2
    assert_same(restored, at_step(initial(1), 2))


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder: Path) -> None:
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[:-100])


def delete_file(folder: Path) -> None:
    largest_file(folder).unlink()


def flip_one_bit(folder: Path) -> None:
    path = largest_file(folder / "params")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, delete_file])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    save_steps(tmp_path, 1, 2, 3)
    damage(tmp_path / "3")
    checkpoints, lines = open_folder(tmp_path, every_steps=1)
    assert checkpoints.metadata()["step"] == 2
    restored, metadata, step = checkpoints.restore(placed_here())
    assert step == 2 and metadata["step"] == 2
    assert_same(restored, at_step(initial(), 2))
    assert len(lines) == 1 and f"the checkpoint {tmp_path / '3'} is damaged" in lines[0]
    # Reading left it where it was; the next save moves it aside and never deletes it.
    assert (tmp_path / "3").exists()
    checkpoints.save(3, at_step(initial(), 3), METADATA)
    checkpoints.close()
    assert (tmp_path / "3.damaged").exists() and "moved the damaged" in lines[1]
    # What lies there now is whole, in this process as in the next.
    assert checkpoints.latest() == 3 and checkpoints.restore(placed_here())[2] == 3
    assert open_folder(tmp_path)[0].restore(placed_here())[2] == 3


def test_a_changed_bit_is_noticed(tmp_path):
    """Orbax itself restores such a checkpoint without a word."""
    params = {"w": np.random.default_rng(0).normal(size=(512, 256)).astype(np.float32)}
    checkpoints, lines = open_folder(tmp_path)
    for step in (1, 2):
        checkpoints.save_params(step, jax.tree.map(jnp.asarray, params), METADATA)
    flip_one_bit(tmp_path / "2")
    restored, _, step = checkpoints.restore_params()
    assert step == 1 and np.array_equal(restored["w"], params["w"])
    assert "the values of params/w are not those that were saved" in lines[0]


def test_when_no_checkpoint_can_be_read_all_are_named(tmp_path):
    save_steps(tmp_path, 1, 2)
    truncate(tmp_path / "1")
    delete_file(tmp_path / "2")
    with pytest.raises(
        UserError, match=r"can be read: 1 is damaged: .*bytes.*2 is damaged: .*missing"
    ):
        open_folder(tmp_path)[0].restore(placed_here())


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("in the way")
    checkpoints, _ = open_folder(tmp_path / "file" / "checkpoints", every_steps=1)
    with pytest.raises(UserError, match="checkpoint of step 1 could not be written"):
        checkpoints.save(1, initial(), METADATA)


KILLED = """
import sys
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
from tests.training.test_checkpoints import METADATA, at_step, make_state, open_folder, placed_here
checkpoints, _ = open_folder(sys.argv[1], every_steps=1, keep_last=2)
state = make_state(placed_here())
print("ready", flush=True)
for step in range(1, 10_000):
    checkpoints.save(step, at_step(state, step), METADATA | {"step": step})
    if step > 1:
        print(step - 1, flush=True)  # the save before is complete
"""


def test_a_kill_at_any_moment_leaves_the_last_complete_checkpoint(tmp_path):
    generator = random.Random(0)
    cache = str(ROOT / ".cache" / "jax")
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder), cache],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        with process:
            assert process.stdout is not None
            seen = list(itertools.islice(process.stdout, 3))
            time.sleep(generator.random() * 0.2)
            process.send_signal(signal.SIGKILL)
            complete = int((process.stdout.read().split() or seen)[-1])
        checkpoints, lines = open_folder(folder, every_steps=1)
        restored, metadata, step = checkpoints.restore(placed_here())
        assert step >= complete and metadata["step"] == step and lines == []
        assert_same(restored, at_step(initial(), step))
        # The next save removes what the killed one left.
        checkpoints.save(step + 1, at_step(initial(), step + 1), METADATA)
        checkpoints.close()
        assert all(path.name.isdigit() for path in folder.iterdir())


# Policy.


def info(step: int, temporary: bool = False, **metrics: float) -> Info:
    return Info(step, {}, metrics, temporary, {}, "threefry2x32")


def test_the_last_few_every_so_many_and_the_best_are_kept():
    policy = config.Checkpoints(keep_last=2, keep_every=50, best="loss", keep_best=2)
    losses = {10: 5.0, 20: 1.0, 30: float("nan"), 40: 2.0, 50: 9.0, 60: 9.0, 70: 9.0, 80: 9.0}
    infos = [info(step, loss=loss) for step, loss in losses.items()]
    assert kept(infos, policy) == {20, 40, 50, 70, 80}
    assert kept([], policy) == set()


def test_a_temporary_checkpoint_lives_until_a_newer_one_is_complete():
    policy = config.Checkpoints(keep_last=2)
    infos = [info(10), info(20), info(23, temporary=True)]
    assert kept(infos, policy) == {10, 20, 23}
    assert kept([*infos, info(27, temporary=True)], policy) == {10, 20, 27}
    assert kept([*infos, info(30)], policy) == {20, 30}


def test_saves_follow_the_policy_on_disk(tmp_path):
    checkpoints, _ = open_folder(tmp_path, every_steps=2, keep_last=1, temporary_every_seconds=1e-9)
    for step in (1, 2, 3, 4):
        assert checkpoints.due(step)
        checkpoints.save(step, initial(), METADATA)
    checkpoints.wait()
    assert checkpoints.steps() == [4]
    checkpoints.save(5, initial(), METADATA)
    checkpoints.wait()
    assert checkpoints.steps() == [4, 5]
    checkpoints.save(6, initial(), METADATA, metrics={"loss": 1.0})
    checkpoints.close()
    assert checkpoints.steps() == [6]


def test_saves_are_due_at_steps_and_by_the_clock():
    by_step = Checkpoints("unused", config.Checkpoints(every_steps=3))
    assert [by_step.due(step) for step in (1, 2, 3, 4)] == [False, False, True, False]
    by_clock = Checkpoints(
        "unused", config.Checkpoints(every_steps=3, temporary_every_seconds=60.0)
    )
    assert not by_clock.due(1)
    by_clock._saved_at -= 61
    assert by_clock.due(1)


def test_a_step_already_saved_is_left_as_it_is(tmp_path):
    save_steps(tmp_path, 1)
    before = sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*"))
    save_steps(tmp_path, 1)
    assert sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*")) == before


# Checksums.


def test_checksums_do_not_depend_on_the_mesh_and_see_every_bit():
    state = make_state(on_mesh(2, 2, 2))
    here = {name: np.asarray(leaf) for name, leaf in named_leaves(state.params).items()}
    sums = checksums(named_leaves(state.params))
    assert sums == checksums(here)
    generator = np.random.default_rng(0)
    for name, array in here.items():
        words = array.copy().view(np.uint32).reshape(-1)
        words[generator.integers(words.size)] ^= np.uint32(1) << np.uint32(generator.integers(32))
        changed = words.view(np.float32).reshape(array.shape)
        assert checksums({name: changed})[name] != sums[name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_checksums_see_swapped_elements_of_any_type(dtype):
    x = jnp.arange(2).astype(dtype)
    assert checksums({"x": x}) != checksums({"x": x[::-1]})
