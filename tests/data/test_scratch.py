"""Large arrays lie in files that nobody sees and nobody has to remove."""

import numpy as np
import pytest

from flaxpretrain.data import scratch
from flaxpretrain.data.scratch import IN_MEMORY_BYTES, ArrayWriter, zeros
from flaxpretrain.errors import UserError

MANY = IN_MEMORY_BYTES // 8 + 1


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("count", [0, 1, MANY - 1, MANY, 3 * MANY])
def test_what_was_written_is_read(folder, count):
    writer = ArrayWriter()
    for part in np.array_split(np.arange(count), 3):
        writer.append(part)
    array = writer.array()
    assert array.dtype == np.int64 and (array == np.arange(count)).all()
    array[count // 2 :] = 7
    assert (array[count // 2 :] == 7).all() and (array[: count // 2] != 7).sum() >= count // 2 - 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("count", [0, 5, 2 * MANY])
def test_zeros_are_as_many_as_wanted(folder, count):
    assert zeros(count).tolist() == [0] * count


def test_a_full_disk_is_named_before_anything_is_lost(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch.mmap, "mmap", full)
    with pytest.raises(UserError, match="No space left on device.*set TMPDIR"):
        zeros(MANY)


def test_no_folder_for_temporary_files_is_named(folder):
    folder.rmdir()
    assert zeros(3).tolist() == [0, 0, 0]
    with pytest.raises(UserError, match="set TMPDIR to a folder"):
        zeros(MANY)
