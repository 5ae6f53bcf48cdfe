"""Models up and down, against a hub on this machine."""

import logging

import jax
import numpy as np
import pytest

from flaxpretrain.conversion import hub
from flaxpretrain.conversion.sources import load_pretrained, open_model
from flaxpretrain.errors import UserError
from tests.conversion.conftest import lead_to
from tests.conversion.fake_hub import COMMIT, TOKEN


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    for name in ("config.json", "README.md", "model.safetensors"):
        (made / name).write_text(f"---\nlicense: mit\n---\n{name}")
    return made


def test_a_push_makes_a_private_repository_and_sends_every_file(fake_hub, folder):
    address = hub.push(folder, "me/model", message="Step 3")
    assert address == f"{fake_hub.address}/me/model"
    made = fake_hub.made[0]
    # Its name changed between releases of huggingface_hub.
    assert made.get("visibility") == "private" or made.get("private") is True
    assert fake_hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_token_is_written_nowhere(fake_hub, folder, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    hub.push(folder, "me/model", message="Step 3")
    assert TOKEN not in caplog.text + "".join(capfd.readouterr())
    written = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert not any(TOKEN.encode() in content for content in written)


def test_no_token(fake_hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="pushing to me/model: .*token.*`hf auth login`"):
        hub.push(folder, "me/model", message="")


def test_a_wrong_token(fake_hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrongOne")
    with pytest.raises(UserError, match="wants a valid token") as error:
        hub.push(folder, "me/model", message="")
    assert "hf_wrongOne" not in str(error.value)


def test_a_token_without_the_right(fake_hub, folder):
    with pytest.raises(UserError, match="pushing to forbidden/model: the token does not allow"):
        hub.push(folder, "forbidden/model", message="")


def test_a_card_that_the_hub_refuses(fake_hub, folder):
    (folder / "README.md").write_text("---\nlicense: nonsense\n---\n")
    with pytest.raises(UserError, match='pushing to me/model: .*"license" must be one of'):
        hub.push(folder, "me/model", message="")


def test_no_network(folder, monkeypatch, tmp_path):
    lead_to(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match="pushing to me/model: http://127.0.0.1:9 cannot be reach"):
        hub.push(folder, "me/model", message="")
    with pytest.raises(UserError, match="downloading me/model: .*cannot be reached"):
        hub.download("me/model")


def test_an_unknown_model(fake_hub):
    with pytest.raises(UserError, match="downloading nobody/nothing: the hub knows no such model"):
        hub.download("nobody/nothing")


def test_a_hub_id_is_a_source(fake_hub, bert_folder):
    fake_hub.files = {path.name: path.read_bytes() for path in bert_folder.iterdir()}
    fake_hub.files["modeling_evil.py"] = b"raise SystemExit('executed')"
    expected = load_pretrained(bert_folder)
    found = load_pretrained("me/model")
    assert found.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert not any(
        "modeling_evil.py" in request for request in fake_hub.requests if "resolve" in request
    )
    origin = open_model("me/model")[1]
    assert (origin.name, origin.hub_id, origin.commit) == ("me/model", "me/model", COMMIT)


@pytest.mark.parametrize("text", ["bert-base-uncased", "owner/name", "owner/na.me_2@v1.0"])
def test_spellings_of_hub_ids(text):
    assert hub.is_hub_id(text)


@pytest.mark.parametrize("text", ["a/b/c", "/abs", "./here", "", "a b", "../x"])
def test_what_is_no_hub_id(text):
    assert not hub.is_hub_id(text)
