"""Searching for what runs fastest: order, what is left out, budget, record. No compiler here."""

import dataclasses

import pytest

from flaxpretrain.analysis import search as searching
from flaxpretrain.analysis.search import Budget, Candidate, Record, best, command, grid, search
from flaxpretrain.analysis.topology import Report
from flaxpretrain.config import Mesh
from flaxpretrain.errors import UserError
from tests import toys

RUN = toys.run()
CANDIDATES = grid((8, 16, 4), ("none", "full"), (Mesh(), Mesh(data=1, fsdp=-1)))


def report(run, fits):
    """What the compiler would say: more rows are faster, recomputing is slower."""
    empty = {str: "", int: 0, float: 0.0, bool: True}
    blank = {f.name: empty.get(f.type) for f in dataclasses.fields(Report)}
    speed = run.phases[0].batch_size / (2 if run.remat == "full" else 1)
    return Report(
        **blank
        | {
            "fits": fits,
            "notes": (),
            "verdict": "as it is",
            "mesh": {"data": 4, "fsdp": 1, "context": 1, "tensor": 1},
            "estimated_tokens_per_second_per_chip": speed if fits else None,
        }
    )


@pytest.fixture
def compiled(monkeypatch):
    """The runs that were compiled; rows over fsdp have room for 8 rows only unless recomputed."""
    runs = []

    def compile_step(run, topology, phase, slices):
        runs.append(run)
        if run.phases[0].batch_size == 4:
            raise UserError("4 rows are too few")
        return report(run, run.phases[0].batch_size <= 4 or run.remat == "full"), None

    monkeypatch.setattr(searching, "compile_step", compile_step)
    return runs


NO_LIMIT = Budget()


def searched(path, budget=NO_LIMIT, code="1"):
    said = []
    found = list(search(RUN, "v5e:2x2", 1, 0, CANDIDATES, Record(path, code), budget, said.append))
    return found, said


def test_the_fastest_that_fits_comes_first_and_larger_misfits_are_left_out(compiled, tmp_path):
    found, said = searched(tmp_path / "record")
    assert len(CANDIDATES) == 12 == sum(not line.endswith("compiling ...") for line in said)
    assert sum("left out, 8 rows do not fit" in line for line in said) == 2
    assert sum("refused: 4 rows are too few" in line for line in said) == 4
    assert [each.candidate.batch_size for each in best(found, 3)] == [16, 16, 8]
    assert {each.candidate.remat for each in best(found, 9)} == {"full"}


def test_a_second_search_compiles_nothing_that_is_known(compiled, tmp_path):
    first, _ = searched(tmp_path / "record")
    count = len(compiled)
    second, _ = searched(tmp_path / "record")
    assert second == first and len(compiled) == count == 10
    searched(tmp_path / "record", code="2")  # other sources
    assert len(compiled) == 2 * count


def test_a_budget_is_kept_and_the_next_search_goes_on(compiled, tmp_path):
    for compiles in (3, 3, 3, 1, 0):
        before = len(compiled)
        searched(tmp_path / "record", Budget(compiles=3))
        assert len(compiled) - before == compiles
    searched(tmp_path / "other", Budget(minutes=1e-9))
    assert len(compiled) == 10


def test_an_interrupted_compilation_is_done_again_but_not_for_ever(compiled, tmp_path, monkeypatch):
    class Killed(BaseException):
        """The process ends here."""

    def ending_in(error):
        def compile_step(*arguments):
            raise error

        monkeypatch.setattr(searching, "compile_step", compile_step)
        record = Record(tmp_path / "record", "1")
        return list(search(RUN, "v5e:2x2", 1, 0, CANDIDATES[:1], record, NO_LIMIT, str))

    for _ in range(searching.MOST_STARTS + 1):
        with pytest.raises(KeyboardInterrupt):
            ending_in(KeyboardInterrupt())
    for _ in range(searching.MOST_STARTS):
        with pytest.raises(Killed):
            ending_in(Killed())
    (found,) = ending_in(Killed())
    assert found.refused == "the compiler ended the process, twice"


def test_a_line_that_a_kill_cut_off_harms_nothing(compiled, tmp_path):
    path = tmp_path / "record"
    searched(path, Budget(compiles=1))
    path.write_text(path.read_text() + '{"key": "abc')
    found, _ = searched(path)
    again, _ = searched(path)
    assert again == found and len(compiled) == 10


def test_the_command_sets_what_was_compiled(compiled, tmp_path):
    found, _ = searched(tmp_path / "record")
    line = command(best(found, 1)[0], "configs/mine.py", ["length=64"], RUN, 0)
    assert line == (
        "python run_pretraining.py configs/mine.py --set length=64 --set mesh.data=4 "
        "--set mesh.fsdp=1 --set mesh.context=1 --set mesh.tensor=1 "
        "--set mesh.shard_optimizer=false --set remat=full --set batch_size=16 "
        "--set microbatches=1"
    )


@pytest.mark.parametrize(
    ("sizes", "remats", "message"),
    [((0,), ("none",), "--batch-sizes: expected pos"), ((8,), ("some",), "--remats: expected")],
)
def test_a_grid_of_what_cannot_be_is_refused(sizes, remats, message):
    with pytest.raises(UserError, match=message):
        grid(sizes, remats, (Mesh(),))


def test_a_candidate_is_shown_as_flags_take_it():
    candidate = Candidate(Mesh(data=4, fsdp=-1, shard_optimizer=True), "dots", 2048)
    assert str(candidate) == "data=4,fsdp=-1,shard_optimizer=true, remat dots, 2,048 rows"
