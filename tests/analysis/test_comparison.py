"""A grid of objectives and architectures: which cells, how long each trains, what is shown."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import pytest

from flaxpretrain.analysis.comparison import (
    ARCHITECTURES,
    NOTHING,
    Cell,
    Result,
    Setting,
    compare,
    grid,
    measure,
    picture,
    runs_of,
    shapes,
    table,
)
from flaxpretrain.data.store import open_dataset
from flaxpretrain.errors import UserError
from tests import toys

SMALL = dict(flops=1e8, width=32, layers=1, length=24, batch_size=8, eval_rows=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    vocabulary = dataclasses.replace(toys.VOCABULARY, sentinels=tuple(range(299, 279, -1)))
    return str(toys.dataset(tmp_path_factory.mktemp("grid") / "data", vocabulary=vocabulary))


def test_a_grid_holds_every_combination_and_noise_without_numbers_once():
    cells = grid(["lm", "shared"], [NOTHING, "spans", "bert", "prefix lm"], [0.15, 0.5], [2, 3])
    names = [cell.name for cell in cells if cell.architecture == "lm"]
    assert names == [
        "lm_nothing",
        *(f"lm_spans_{rate}_{span}" for rate in (0.15, 0.5) for span in (2, 3)),
        "lm_bert_0.15",
        "lm_bert_0.5",
        "lm_prefix_lm",
    ]
    assert len(cells) == 2 * len(names) == len({cell.name for cell in cells})


def test_every_cell_trains_with_as_many_flops(data):
    setting = Setting(data=data, **(SMALL | {"flops": 1e10}))
    vocabulary = open_dataset(setting.data).vocabulary
    for cell in grid(ARCHITECTURES, ["spans", "bert"], [0.15], [3.0]):
        for run, budget in zip(runs_of(cell, setting), (1e10, 0.25e10), strict=True):
            framing = run.objective.framing(vocabulary, setting.length)
            step = run.objective.flops(run.model, shapes(framing.spec(setting.batch_size)))
            assert abs(run.phases[0].steps - budget / step) <= 0.5


def test_cells_are_trained_compared_and_not_trained_again(data, tmp_path):
    setting = Setting(data=data, **SMALL)
    cell = Cell(architecture="shared", objective="drop spans", rate=0.15, span=3.0)
    said = []
    result = compare([cell], setting, tmp_path, said.append)[cell]
    assert len(said) == 1 and result.steps > 0 and result.parameters > 0
    assert result.own_loss > 0 and result.probe_loss > 0 and 0 <= result.probe_accuracy <= 1
    assert measure(cell, setting, tmp_path / cell.name) == result
    with pytest.raises(UserError, match="another setting"):
        measure(cell, dataclasses.replace(setting, seed=1), tmp_path / cell.name)


def test_table_and_picture_put_the_best_first():
    setting = Setting(data="data")
    results = {
        Cell(architecture="lm", objective=NOTHING): Result(10**6, 0, None, None, 5.0, 0.1, 1.0),
        Cell(architecture="shared", objective="spans", rate=0.15, span=3.0): Result(
            2 * 10**6, 1200, 4.0, 0.2, 4.5, 0.15, 2.0
        ),
    }
    lines = table(results, setting).splitlines()
    assert lines[2].startswith("| shared | spans | 0.15 | 3 | 2.00 M | 1,200 | 4.500 |")
    assert lines[3].startswith("| lm | nothing |  |  | 1.00 M | 0 | 5.000 |")
    drawn = ElementTree.fromstring(picture(results, setting))
    dots = [e for e in drawn.iter() if e.tag.endswith("circle")]
    assert len(dots) == len(results) + len(ARCHITECTURES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grid(["tower"], ["spans"], [0.15], [3]), "--architectures: expected some of"),
        (lambda: grid(["lm"], ["span"], [0.15], [3]), "--objectives: .* got 'span'"),
        (lambda: Setting(data="d", probe="x"), "--probe: expected one of"),
        (lambda: Setting(data="d", probe_share=0.0), "--probe-share"),
        (lambda: Setting(data="d", width=40), "--width a multiple of 32"),
    ],
)
def test_a_mistake_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
