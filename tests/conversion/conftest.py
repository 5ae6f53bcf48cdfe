"""What the tests of this room share."""

import pytest

from flaxpretrain.conversion.importing import import_model
from flaxpretrain.conversion.sources import open_checkpoint
from tests.conversion.fake_hub import TOKEN, running
from tests.conversion.originals import saved


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    """A tiny BertForMaskedLM as Transformers saves it, with its tokenizer."""
    pytest.importorskip("torch", reason="makes the original with PyTorch Transformers")
    return saved(tmp_path_factory.mktemp("bert"), "BertForMaskedLM")


@pytest.fixture(scope="session")
def checkpoint(bert_folder, tmp_path_factory):
    """The same as the checkpoint of a workdir."""
    workdir = tmp_path_factory.mktemp("imported") / "workdir"
    import_model(bert_folder, workdir, None, say=print)
    return open_checkpoint(workdir)


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """A hub on this machine, to which huggingface_hub is led, with a token that it takes."""
    with running() as server:
        lead_to(monkeypatch, server.address, tmp_path)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def lead_to(monkeypatch, address, tmp_path):
    """Makes huggingface_hub use this address, and no cache or token of the machine."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
