"""The reader of TensorFlow's checkpoints, on one that TensorFlow 1.15 wrote.

`fixtures/tensorflow/mixed`: two variables, (3, 5) and scalar, of each number type, alternately on
two CPU devices; `parted/table` [300, 3] partitioned in three along axis 0 and `parted/wide`
[2, 70] in two along axis 1; saved by tf.train.Saver(sharded=True). `values.npz` holds what the
session said the variables were, bfloat16 as float32, `|` for `/`.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from flaxpretrain.conversion.bundle import Bundle
from flaxpretrain.conversion.crc32c import crc32c, unmasked
from flaxpretrain.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures" / "tensorflow"
PREFIX = FIXTURES / "mixed" / "model.ckpt-3"


@pytest.fixture
def copy(tmp_path):
    """A copy of the checkpoint that a test may spoil."""
    return shutil.copytree(PREFIX.parent, tmp_path / "copy") / PREFIX.name


def spoil(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_every_type_comes_back_from_either_data_file():
    bundle = Bundle(PREFIX)
    with np.load(PREFIX.with_name("values.npz")) as values:
        plain = {n.replace("|", "/"): values[n] for n in values.files if not n.startswith("parted")}
    assert len(plain) == 2 * 9 and plain.keys() <= bundle.shapes.keys()
    for name, value in plain.items():
        read = bundle.read(name)
        assert read.dtype.name == name.split("/")[-1].split("_")[0]
        assert read.shape == value.shape == bundle.shapes[name]
        np.testing.assert_array_equal(read.astype(value.dtype), value)


def test_partitioned_variables_are_put_together():
    bundle = Bundle(PREFIX)
    with np.load(PREFIX.with_name("values.npz")) as values:
        table = values["parted|table"]
        wide = np.concatenate([values[f"parted|wide|part_{i}"] for i in (0, 1)], axis=1)
    np.testing.assert_array_equal(bundle.read("parted/table"), table)
    np.testing.assert_array_equal(bundle.read("parted/wide"), wide)
    assert bundle.shapes["parted/wide"] == (2, 70)


def test_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError):
        Bundle(PREFIX).read("parted")


def test_a_checkpoint_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"model.ckpt-4 is no prefix .* there is no file"):
        Bundle(PREFIX.with_name("model.ckpt-4"))


@pytest.mark.parametrize("at", [0, 200, 700, -60, -45, -1])
def test_a_changed_byte_of_the_index_is_noticed(copy, at):
    spoil(copy.with_name("model.ckpt-3.index"), at)
    with pytest.raises(UserError, match=r"model.ckpt-3.index is no index of a checkpoint"):
        Bundle(copy)


@pytest.mark.parametrize("size", [0, 20, 300, 890])
def test_a_cut_index_is_noticed(copy, size):
    index = copy.with_name("model.ckpt-3.index")
    index.write_bytes(index.read_bytes()[:size])
    with pytest.raises(UserError, match="no index of a checkpoint, or damaged"):
        Bundle(copy)


def test_a_changed_a_cut_and_a_missing_data_file_are_named(copy):
    data = copy.with_name("model.ckpt-3.data-00000-of-00002")
    content = data.read_bytes()
    spoil(data, 17)
    with pytest.raises(UserError, match=r"00000-of-00002 is damaged: the checksum of parted/table"):
        Bundle(copy).read("parted/table")
    data.write_bytes(content[:100])
    with pytest.raises(UserError, match="is damaged"):
        Bundle(copy).read("parted/table")
    data.unlink()
    with pytest.raises(UserError, match="00000-of-00002 is missing"):
        Bundle(copy).read("parted/table")


def test_crc32c_of_the_standards_examples():
    """RFC 3720, B.4, and the usual check value."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"") == 0


@pytest.mark.parametrize("size", [1, 3, 15, 16, 63, 64, 65, 257, 1000, 4097])
def test_crc32c_is_that_of_the_plain_definition(size):
    content = np.random.default_rng(size).bytes(size)
    register = 0xFFFFFFFF
    for byte in content:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    assert crc32c(content) == register ^ 0xFFFFFFFF


def test_masking_rotates_and_adds():
    """The inverse of tensorflow::crc32c::Mask."""
    plain = 0x12345678
    rotated = (plain >> 15 | plain << 17) & 0xFFFFFFFF
    assert unmasked((rotated + 0xA282EAD8) & 0xFFFFFFFF) == plain
