"""Files of tensors: whole, in shards, of PyTorch, damaged."""

import json
import os
import stat

import numpy as np
import pytest
import safetensors

from flaxpretrain.conversion.tensors import read_tensors, weight_files, write_tensors
from flaxpretrain.errors import UserError


@pytest.fixture
def tensors():
    generator = np.random.default_rng(0)
    shapes = {"a": (4, 3), "b": (5,), "c": (2, 2, 2), "d": (7, 7)}
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def test_one_file_says_its_format(tmp_path, tensors):
    assert write_tensors(tmp_path, tensors) == ["model.safetensors"]
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    same(read_tensors(tmp_path), tensors)


def test_a_view_is_written_as_it_looks(tmp_path, tensors):
    """safetensors itself would write a transposed array in its order in memory."""
    views = {name: tensor.T[::-1] for name, tensor in tensors.items()}
    write_tensors(tmp_path, views)
    same(read_tensors(tmp_path), views)


def test_the_file_is_as_readable_as_any_other(tmp_path, tensors):
    (tmp_path / "other").touch()
    write_tensors(tmp_path, tensors)
    mode = stat.S_IMODE(os.stat(tmp_path / "model.safetensors").st_mode)
    assert mode == stat.S_IMODE(os.stat(tmp_path / "other").st_mode)


def test_shards_and_their_index(tmp_path, tensors):
    files = write_tensors(tmp_path, tensors, max_shard_bytes=90)
    assert files == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    assert index["weight_map"]["d"] == files[2]
    # A tensor larger than a shard is a shard of its own.
    assert tensors["d"].nbytes > 90
    same(read_tensors(tmp_path), tensors)


def test_half_precision_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    values = {"a": torch.arange(6.0).reshape(2, 3)}
    save_file({n: t.bfloat16() for n, t in values.items()}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(
        read_tensors(tmp_path)["a"].astype(np.float32), values["a"].numpy()
    )


def test_pytorch_files_are_read_as_weights_only(tmp_path, tensors):
    torch = pytest.importorskip("torch")
    torch.save({n: torch.tensor(t) for n, t in tensors.items()}, tmp_path / "pytorch_model.bin")
    same(read_tensors(tmp_path), tensors)


class Payload:
    """What would be executed by an unpickler that trusts its input."""

    def __reduce__(self):
        return print, ("executed",)


def test_a_pytorch_file_with_code_is_refused(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    torch.save({"a": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin cannot be read as weights only"):
        read_tensors(tmp_path)
    assert "executed" not in capsys.readouterr().out


def test_safetensors_are_preferred(tmp_path, tensors):
    write_tensors(tmp_path, tensors)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    same(read_tensors(tmp_path), tensors)


def test_mistakes_are_named(tmp_path, tensors):
    with pytest.raises(UserError, match="holds no weights: expected model.safetensors or pytorch"):
        weight_files(tmp_path)
    write_tensors(tmp_path, tensors, max_shard_bytes=90)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors cannot be read"):
        read_tensors(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match="lacks model-00002-of-00003.safetensors"):
        read_tensors(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(UserError, match="shards must lie beside their index"):
        read_tensors(tmp_path)
    index.write_text("[]")
    with pytest.raises(UserError, match="expected an object"):
        read_tensors(tmp_path)
