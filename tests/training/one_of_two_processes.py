"""Run twice by test_sharding: ADDRESS INDEX FOLDER. Each process has two fake devices."""

import functools
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh

from flaxpretrain.data.store import open_dataset
from flaxpretrain.training.distributed import initialize_distributed
from flaxpretrain.training.session import open_pipeline, resolve_phases
from flaxpretrain.training.sharding import (
    make_mesh,
    process_rows,
    replicated,
    state_shardings,
    to_device,
)
from tests import toys
from tests.training.test_checkpoints import (
    METADATA,
    at_step,
    delete_file,
    initial,
    open_folder,
)

ROWS = np.arange(48, dtype=np.int32).reshape(16, 3)


def each_process_loads_its_half(index: int) -> None:
    for sizes in ((4, 1, 1), (2, 2, 1), (1, 2, 2)):
        mesh = make_mesh(*sizes)
        mine = process_rows(mesh, 16)
        assert mine == slice(8 * index, 8 * index + 8), mine
        batch = to_device({"ids": ROWS[mine]}, mesh, 16)
        whole = jax.jit(lambda x: x + 0, out_shardings=replicated(mesh))(batch["ids"])
        np.testing.assert_array_equal(np.asarray(whole), ROWS)


def processes_that_differ_along_tensor_load_the_same_rows() -> None:
    grid = np.array(jax.devices()).reshape(2, 2).T.reshape(2, 1, 2)
    mesh = Mesh(grid, ("data", "fsdp", "tensor"))
    assert process_rows(mesh, 16) == slice(0, 16)
    batch = to_device({"ids": ROWS}, mesh, 16)
    total = jax.jit(lambda x: x.sum(), out_shardings=replicated(mesh))(batch["ids"])
    assert int(total) == ROWS.sum()


def each_batch_is_that_of_one_process(folder: Path) -> None:
    run = toys.packed_run(str(folder))
    dataset = open_dataset(folder)
    pipeline = open_pipeline(run, dataset, resolve_phases(run, dataset))
    mesh = make_mesh(2, 2, 1)
    loaded = pipeline.iterate(2, 5, functools.partial(process_rows, mesh))
    for step, mine in enumerate(loaded, 2):
        whole = pipeline.batch(step)
        placed = to_device(mine, mesh, 8)
        gathered = jax.jit(lambda b: b, out_shardings=replicated(mesh))(placed)
        assert gathered.keys() == whole.keys()
        for name, array in gathered.items():
            assert len(mine[name]) == 4, name
            np.testing.assert_array_equal(np.asarray(array), whole[name])


def both_save_and_agree_on_what_is_damaged(index: int, folder: Path) -> None:
    mesh = make_mesh(1, 2, 2)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(initial)
        shardings = state_shardings(abstract, (), mesh)
        state = jax.jit(initial, out_shardings=shardings)()
        checkpoints, _ = open_folder(folder, every_steps=1, keep_last=2)
        for step in (1, 2, 3):
            moved = jax.jit(lambda s, n=step: at_step(s, n), out_shardings=shardings)(state)
            checkpoints.save(step, moved, METADATA)
        checkpoints.close()
        sync_global_devices("the first process has deleted")
        assert checkpoints.steps() == [2, 3], checkpoints.steps()
        sync_global_devices("both have looked")
        if index == 0:
            delete_file(folder / "3" / "params")
        sync_global_devices("damaged")
        checkpoints, lines = open_folder(folder, every_steps=1)
        target = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            abstract,
            shardings,
        )
        restored, _, step = checkpoints.restore(target)
        assert (step, len(lines)) == (2, 1 if index == 0 else 0), (step, lines)
        expected = jax.jit(lambda: at_step(initial(), 2), out_shardings=shardings)()
        for leaf, right in zip(
            jax.tree.leaves(restored.params), jax.tree.leaves(expected.params), strict=True
        ):
            for mine, wanted in zip(leaf.addressable_shards, right.addressable_shards, strict=True):
                np.testing.assert_array_equal(mine.data, wanted.data)


if __name__ == "__main__":
    address, index, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    assert initialize_distributed(address, 2, index)
    each_process_loads_its_half(index)
    processes_that_differ_along_tensor_load_the_same_rows()
    each_batch_is_that_of_one_process(folder.parent / "toy")
    both_save_and_agree_on_what_is_damaged(index, folder)
    print("fine", index)
