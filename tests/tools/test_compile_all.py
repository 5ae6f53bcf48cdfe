"""The committed record of compilations covers every recipe as it is now."""

import json
from pathlib import Path

import pytest

from flaxpretrain.analysis.pods import ONE_A_FAMILY, pod_of, slices_of, source_hash
from flaxpretrain.errors import UserError

ROOT = Path(__file__).parent.parent.parent
RECORD = ROOT / "benchmarks" / "results" / "tpu_compile.json"
RECIPES = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_s_entry_is_of_its_present_code_and_fits(path):
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    again = "run python tools/compile_all.py and commit benchmarks/results/tpu_compile.json"
    assert path.stem in record, f"{path.stem} was not compiled yet: {again}"
    entry = record[path.stem]
    assert entry["source_hash"] == source_hash(path), f"{path.stem} has changed: {again}"
    assert all(phase["fits"] for phase in entry["phases"])
    assert {phase["topology"] for phase in entry["phases"]} == set(slices_of(path))


def test_one_recipe_a_family_is_compiled_for_every_generation():
    from flaxpretrain.analysis.topology import GENERATIONS

    recipes = {path.stem: path for path in RECIPES}
    for name in ONE_A_FAMILY:
        slices = slices_of(recipes[name])
        assert {topology.partition(":")[0] for topology in slices} == set(GENERATIONS)


def test_the_record_names_no_recipe_that_is_gone():
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    assert set(record) <= {path.stem for path in RECIPES}


def recipe(folder, text):
    path = folder / "mine.py"
    path.write_text(text)
    return path


def test_comments_docstrings_and_layout_do_not_change_the_hash(tmp_path):
    one = source_hash(recipe(tmp_path, '"""One."""\nRATE = 1  # why\n'))
    two = source_hash(recipe(tmp_path, '"""Two."""\n\n\nRATE = (1)\n'))
    three = source_hash(recipe(tmp_path, '"""Two."""\n\n\nRATE = 2\n'))
    assert one == two != three


def test_a_recipe_built_on_another_changes_with_it(tmp_path):
    base = tmp_path / "base.py"
    base.write_text("RATE = 1\n")
    mine = recipe(tmp_path, "from base import RATE\n")
    before = source_hash(mine)
    base.write_text("RATE = 2\n")
    assert source_hash(mine) != before


def test_the_model_s_code_counts(tmp_path):
    bare = source_hash(recipe(tmp_path, "import json\n"))
    assert source_hash(recipe(tmp_path, "from flaxpretrain.models import bert\n")) != bare


def test_a_recipe_without_a_slice_is_refused(tmp_path):
    with pytest.raises(UserError, match="names no TPU slice: add a line such as POD"):
        pod_of(recipe(tmp_path, "RATE = 1\n"))
