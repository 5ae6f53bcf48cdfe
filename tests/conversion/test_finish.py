"""Exports at the end of a run, and pushes beside it that never stop it."""

import json

import numpy as np
import pytest
from huggingface_hub import metadata_load

from flaxpretrain.conversion.finish import Export, PushToHub
from flaxpretrain.conversion.sources import load_pretrained
from flaxpretrain.conversion.tensors import read_tensors
from flaxpretrain.errors import UserError
from flaxpretrain.models.names import to_state_dict
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.loop import train
from tests import toys
from tests.evaluation import speech
from tests.evaluation.conftest import data as data

COMMAND = "python run_pretraining.py recipe.py"


def folders_tensors(workdir):
    config, params, _ = load_pretrained(workdir)
    return to_state_dict(params, type(config).names, config.vocab_size)


def trained(data, workdir, steps=2, **changes):
    assert train(speech.run(data, steps, **changes), workdir, command=COMMAND) == 0
    return workdir


def test_an_export_of_the_last_step_lies_in_the_workdir(data, tmp_path, capsys):
    pytest.importorskip("torch", reason="compares with PyTorch Transformers")
    workdir = trained(data, tmp_path / "w", finish=(Export(license="apache-2.0"),))
    exported = read_tensors(workdir / "hf")
    for name, tensor in folders_tensors(workdir).items():
        np.testing.assert_array_equal(exported[name], tensor, err_msg=name)
    card = (workdir / "hf" / "README.md").read_text()
    assert metadata_load(workdir / "hf" / "README.md")["license"] == "apache-2.0"
    for part in (COMMAND, "for 2 steps", "validation/masked_lm", "8 x cpu", "With flaxpretrain"):
        assert part in card, part
    assert str(tmp_path) not in card
    said = "".join(capsys.readouterr())
    assert "outputs equal those of Transformers within" in said
    assert json.loads((workdir / "run.json").read_text())["command"] == COMMAND


def test_the_exported_tokenizer_gives_the_ids_of_the_dataset(data, tmp_path):
    from transformers import AutoTokenizer

    trained(data, tmp_path, finish=(Export(compare=False),))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), speech.tokenizer().backend
    for text in [*speech.sentences(50), "The KING sees [MASK], unheard-of!"]:
        assert theirs(text).input_ids == ours.encode(text).ids


def test_a_dataset_with_another_padding_token_is_refused(data, tmp_path):
    model = toys.bert(vocab_size=speech.run(data).model.vocab_size, pad_token_id=3)
    with pytest.raises(UserError, match="is 0, but model.pad_token_id is 3: add --set model.pad"):
        train(speech.run(data, model=model), tmp_path)


def test_an_export_is_replaced_when_the_run_goes_on(data, tmp_path):
    finish = (Export(compare=False, folder="out"),)
    trained(data, tmp_path, finish=finish)
    before = read_tensors(tmp_path / "out")
    trained(data, tmp_path, steps=4, finish=finish)
    after = read_tensors(tmp_path / "out")
    assert "for 4 steps" in (tmp_path / "out" / "README.md").read_text()
    assert any((before[name] != after[name]).any() for name in before)


def test_pushes_beside_the_run(data, tmp_path, fake_hub, capsys):
    push = PushToHub(repository="me/toy", every_steps=2, license="mit")
    evaluations = (FixedNoise(batch_size=8, every_steps=2), push)
    workdir = trained(data, tmp_path / "w", steps=4, evaluations=evaluations)
    said = "".join(capsys.readouterr())
    assert "step 4: pushed to" in said and "me/toy" in said
    card = fake_hub.files["README.md"].decode()
    assert card.split("---\n")[2].startswith("\n# toy\n")
    assert "for 4 steps" in card
    (tmp_path / "got").mkdir()
    for name, content in fake_hub.files.items():
        (tmp_path / "got" / name).write_bytes(content)
    pushed = read_tensors(tmp_path / "got")
    for name, tensor in folders_tensors(workdir).items():
        np.testing.assert_array_equal(pushed[name], tensor, err_msg=name)


def test_training_does_not_wait_for_a_slow_hub(data, tmp_path, fake_hub, capsys):
    """The hub answers only after the fourth step has been evaluated."""
    fake_hub.gate.clear()

    class OpensTheGate(FixedNoise):
        def run(self, session):
            if session.step == 6:
                fake_hub.gate.set()
            return super().run(session)

    evaluations = (
        PushToHub(repository="me/toy", every_steps=2),
        OpensTheGate(batch_size=8, every_steps=2, name="opens"),
    )
    train(speech.run(data, 8, evaluations=evaluations), tmp_path, command=COMMAND)
    said = "".join(capsys.readouterr())
    assert "step 4: the push before is still under way, left out" in said
    assert "step 2: pushed to" in said and "step 8: pushed to" in said
    assert "for 8 steps" in fake_hub.files["README.md"].decode()


def test_a_failing_push_is_a_line(data, tmp_path, fake_hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrongOne")
    workdir = trained(
        data,
        tmp_path / "w",
        evaluations=(PushToHub(repository="me/toy", every_steps=1),),
        finish=(Export(compare=False, push_to_hub="me/toy"),),
    )
    said = "".join(capsys.readouterr())
    assert "push failed, training goes on: pushing to me/toy: the hub wants a valid token" in said
    assert "the export is whole, push it with: hf upload me/toy" in said
    assert "hf_wrongOne" not in said
    assert (workdir / "hf" / "model.safetensors").exists()
    assert fake_hub.files == {}


def test_values_that_cannot_be():
    with pytest.raises(UserError, match="Export.folder: expected a name in the workdir"):
        Export(folder="../elsewhere")
    with pytest.raises(UserError, match="--license gpl-v3"):
        Export(license="gpl-v3")
    with pytest.raises(UserError, match="PushToHub.repository: expected owner/name"):
        PushToHub(repository="a/b/c")


def test_recipes_with_them_can_be_rendered_and_read_back():
    from flaxpretrain.config import parse, render

    for value in (Export(push_to_hub="me/toy"), PushToHub(repository="me/toy", every_steps=5)):
        assert parse(render(value)) == value
