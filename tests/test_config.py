"""Recipes, overrides, and what a resumed run may change."""

import dataclasses
import json

import jax
import pytest

from flaxpretrain.config import Phase, differences, load, override, parse, ramp, render
from flaxpretrain.errors import UserError
from tests import toys


@pytest.mark.parametrize(
    ("name", "text", "path", "expected"),
    [
        ("steps", "60", "phases.0.steps", 60),
        ("batch_size", "32", "phases.0.batch_size", 32),
        ("model.hidden_size", "64", "model.hidden_size", 64),
        ("mesh.tensor", "2", "mesh.tensor", 2),
        ("checkpoints.every_steps", "10", "checkpoints.every_steps", 10),
        ("logging.every_steps", "1", "logging.every_steps", 1),
        ("logging.tensorboard", "false", "logging.tensorboard", False),
        ("optimizer.learning_rate", "1e-4", "optimizer.learning_rate", 1e-4),
        ("optimizer.clip_norm", "none", "optimizer.clip_norm", None),
        ("optimizer.clip_norm", "1", "optimizer.clip_norm", 1.0),
        ("objective.terms.masked_lm", "2.5", "objective.terms.masked_lm", 2.5),
        ("objective.masking.rate", ".3", "objective.masking.rate", 0.3),
        ("phases.0.steps", "1e2", "phases.0.steps", 100),
        ("data.folder", "here", "data.folder", "here"),
        ("model.heads", "('mlm', 'pooler')", "model.heads", ("mlm", "pooler")),
    ],
)
def test_an_override_is_read_by_the_fields_type(name, text, path, expected):
    value = override(toys.run(), name, text)
    for part in path.split("."):
        if isinstance(value, tuple):
            value = value[int(part)]
        else:
            value = value[part] if isinstance(value, dict) else getattr(value, part)
    assert value == expected and type(value) is type(expected)


def test_setting_the_tokens_of_a_phase_replaces_its_steps():
    phase = override(toys.run(), "tokens", "1e6").phases[0]
    assert (phase.steps, phase.tokens) == (None, 1_000_000)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("stps", "20", "did you mean 'steps'"),
        ("model.hiden_size", "64", "did you mean 'hidden_size'"),
        ("modle.hidden_size", "64", "did you mean 'model'"),
        ("model.hidden_size", "big", "expected a whole number; got 'big'"),
        ("model.hidden_size", "1.5", "expected a whole number"),
        ("steps", "none", "exactly one of"),
        ("phases.3.steps", "1", "not an index below 1"),
        ("objective.terms.mlm", "1", "did you mean 'masked_lm'"),
        ("steps.more", "1", "no field 'steps'"),
        ("optimizer", "AdamW", "optimizer holds AdamW; change its fields"),
        ("batch_size", "0", "must be positive"),
        ("precision.compute", "float8", "float32, bfloat16 or float16"),
        ("precision.reduce", "float16", "float32 or bfloat16"),
        ("precision.matmul", "int4", "default, int8, int8_forward, fp8 or fp8_forward; got int4"),
    ],
)
def test_a_bad_override_is_one_clear_line(name, text, message):
    with pytest.raises(UserError, match=message) as error:
        override(toys.run(), name, text)
    assert "\n" not in str(error.value)


def test_an_override_of_many_phases_must_say_which():
    run = toys.run(phases=(Phase(steps=1, length=16, batch_size=8),) * 2)
    with pytest.raises(UserError, match="write phases.0.steps to phases.1.steps"):
        override(run, "steps", "3")
    assert override(run, "phases.1.steps", "3").phases[1].steps == 3


def test_a_rendered_run_is_json_and_can_be_rebuilt():
    run = toys.run()
    assert parse(json.loads(json.dumps(render(run)))) == run


def test_a_configuration_from_elsewhere_cannot_call_functions():
    with pytest.raises(UserError, match="not a dataclass"):
        parse({"class": "os.system", "command": "true"})


def test_a_configuration_with_an_unknown_field_is_refused():
    data = render(toys.run())
    data["mesh"]["dta"] = 1
    with pytest.raises(UserError, match="did you mean 'data'"):
        parse(data)


def test_home_folders_do_not_reach_config_json(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    data = dataclasses.replace(toys.run().data, folder="/home/someone/corpus")
    assert render(data)["folder"] == "~/corpus"


def test_what_may_change_at_resume_and_what_may_not():
    old = render(toys.run())
    run = toys.run()
    for name, value in (("steps", "9"), ("mesh.fsdp", "2"), ("checkpoints.every_steps", "5")):
        run = override(run, name, value)
    assert differences(old, render(run)) == []
    changed = override(override(run, "optimizer.learning_rate", "1"), "batch_size", "16")
    assert differences(old, render(changed)) == [
        "optimizer.learning_rate: 0.001 -> 1.0",
        "phases.0.batch_size: 8 -> 16",
    ]


def test_a_field_that_an_older_version_did_not_have_stood_at_its_default():
    run = toys.run()
    old = render(run)
    del old["precision"]["reduce"], old["seeds"], old["guard"], old["phases"][0]["microbatches"]
    assert differences(old, render(run)) == []
    changed = override(override(run, "precision.reduce", "bfloat16"), "seeds.noise", "7")
    assert differences(old, render(changed)) == [
        'precision.reduce: "float32" -> "bfloat16"',
        "seeds.noise: 0 -> 7",
    ]


def test_a_class_that_is_gone_is_compared_as_it_was_written():
    old = render(toys.run()) | {"guard": {"class": "gone.Guard", "window": 4}}
    assert differences(old, render(toys.run())) == [
        'guard.class: "gone.Guard" -> null',
        "guard.window: 4 -> null",
    ]


HARDWARE_RECIPE = """
from flaxpretrain.hardware import HardwareRule
from tests import toys


def recipe():
    rule = HardwareRule("cpu", {"remat": "dots", "microbatches": 2}, devices=(8, 8))
    return toys.run(hardware=(rule,))
"""


def test_a_recipe_s_rule_for_the_devices_applies_and_an_override_wins(tmp_path):
    path = tmp_path / "ruled.py"
    path.write_text(HARDWARE_RECIPE)
    devices = jax.devices()
    run = load(path, ["microbatches=4"], devices)
    assert (run.remat, run.phases[0].microbatches) == ("dots", 4)
    assert load(path).remat == load(path, devices=devices[:4]).remat == "save_all"
    # The rules stay, and may be changed themselves; none of it stands in the way of a resume.
    assert parse(json.loads(json.dumps(render(run)))) == run
    assert load(path, ["hardware.0.settings.remat=full"], devices).remat == "full"
    assert differences(render(load(path)), render(run)) == []


def test_a_rule_by_tokens_splits_the_batch_that_is_asked_for_on_the_mesh_that_is(tmp_path):
    path = tmp_path / "ruled.py"
    rule = HARDWARE_RECIPE.replace('{"remat": "dots", "microbatches": 2}', "tokens_per_device=64")
    path.write_text(rule)
    devices = jax.devices()

    def microbatches(*overrides):
        return load(path, overrides, devices).phases[0].microbatches

    # Rows of 32: two at once fit a device.
    assert [microbatches(f"batch_size={rows}") for rows in (8, 16, 64)] == [1, 1, 4]
    assert microbatches("batch_size=64", "mesh.tensor=2") == 8
    assert microbatches("batch_size=64", "mesh.data=2", "mesh.tensor=4") == 16
    assert microbatches("batch_size=64", "microbatches=2") == 2
    assert microbatches("batch_size=12") == 1  # refused later, by the step


def test_a_rule_with_a_value_that_cannot_be_is_refused(tmp_path):
    path = tmp_path / "ruled.py"
    path.write_text(HARDWARE_RECIPE.replace('"microbatches": 2', '"mesh.rows": 2'))
    with pytest.raises(UserError, match="mesh.rows: Mesh has no field 'rows'"):
        load(path, devices=jax.devices())


def test_a_ramp_ends_at_its_end_and_has_all_its_steps():
    phases = ramp(length=16, start=8, end=32, stages=4, steps=10)
    assert [p.batch_size for p in phases] == [8, 16, 24, 32]
    assert sum(p.steps for p in phases) == 10


def test_rows_longer_than_the_models_positions_are_refused():
    with pytest.raises(UserError, match="rows of 128 tokens"):
        toys.run(phases=(Phase(steps=1, length=128, batch_size=8),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file"),
        ("x = 1", "defines no function recipe"),
        ("def recipe(): return 3", "must return a Run; it returned int"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, content, message):
    path = tmp_path / "some_recipe.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load(path)


def test_a_recipe_may_use_an_objective_from_the_file_beside_it(tmp_path):
    (tmp_path / "my_objective_beside.py").write_text(
        "import dataclasses\n"
        "from flaxpretrain.objectives.masked_lm import MaskedLM\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True)\n"
        "class Mine(MaskedLM):\n"
        "    strength: float = 1.0\n"
    )
    (tmp_path / "my_recipe_beside.py").write_text(
        "import dataclasses\n"
        "from my_objective_beside import Mine\n"
        "from tests import toys\n"
        "def recipe():\n"
        "    mine = Mine(masking=toys.masked_lm().masking)\n"
        "    return dataclasses.replace(toys.run(), objective=mine)\n"
    )
    run = load(tmp_path / "my_recipe_beside.py", ["objective.strength=3"])
    assert (run.name, run.objective.strength) == ("my_recipe_beside", 3.0)
    assert parse(render(run)) == run
