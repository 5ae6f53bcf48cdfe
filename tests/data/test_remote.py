"""A dataset in a store that answers requests: the same rows, one line for each thing that fails."""

import time

import fsspec
import numpy as np
import pytest

from benchmarks.range_server import RangeServer
from flaxpretrain.config import Data, Phase
from flaxpretrain.data.files import RemoteFiles
from flaxpretrain.data.framing import MaskedFraming
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.pipeline import Pipeline, Share, evaluation_batches
from flaxpretrain.data.rows import Blocks, Documents
from flaxpretrain.data.store import open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.locations import joined
from tests.data.streams import VOCABULARY, make_split

LENGTHS = np.random.default_rng(3).integers(1, 60, 60)
DELAY_SECONDS = 0.05
LAYOUTS = pytest.mark.parametrize("layout", [Blocks(), Documents()], ids=["blocks", "documents"])


def framing_of(length):
    return MaskedFraming(vocabulary=VOCABULARY, length=length, masking=TokenMasking(rate=0.3))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(RemoteFiles, "first_pause_seconds", 0.001)


@pytest.fixture
def folder(tmp_path):
    make_split(tmp_path / "data", LENGTHS, shard_bytes=1000)
    return tmp_path / "data"


@pytest.fixture
def server(folder):
    with RangeServer(folder) as server:
        yield server


def pipeline_of(split, layout, window_tokens=600, steps=100):
    return Pipeline(
        split,
        layout,
        framing_of,
        (Phase(length=32, batch_size=8, steps=steps),),
        order_seed=1,
        noise_seed=2,
        window_tokens=window_tokens,
    )


def equal(a, b):
    return a.keys() == b.keys() and all((a[n] == b[n]).all() for n in a)


@LAYOUTS
def test_batches_from_afar_are_those_of_the_disk(server, folder, layout):
    server.delay_seconds = DELAY_SECONDS
    near = pipeline_of(open_dataset(folder).split("train"), layout)
    far = pipeline_of(open_dataset(server.url).split("train"), layout)
    for step, batch in enumerate(far.iterate(0, 30)):
        assert equal(batch, near.batch(step))


def test_rows_lie_in_a_bucket_of_amazons(folder, monkeypatch):
    from tests.data.amazon import serving

    near = pipeline_of(open_dataset(folder).split("train"), Documents())
    with serving(monkeypatch, folder):
        far = pipeline_of(open_dataset("s3://bucket").split("train"), Documents())
        for step, batch in enumerate(far.iterate(0, 30)):
            assert equal(batch, near.batch(step))


def test_any_store_of_fsspec_will_do(folder):
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/data", recursive=True)
    dataset = open_dataset("memory://bucket/data")
    near = open_dataset(folder)
    assert dataset.folder == "memory://bucket/data"
    assert equal(*(pipeline_of(d.split("train"), Blocks()).batch(3) for d in (dataset, near)))
    dataset.verify()


@LAYOUTS
def test_the_order_is_a_pure_function_of_the_step_on_any_number_of_hosts(server, layout):
    split = open_dataset(server.url).split("train")
    one = pipeline_of(split, layout)
    hosts = [pipeline_of(split, layout) for _ in range(2)]
    for step in (29, 3):
        parts = [p.batch(step, Share(host, 2)) for host, p in enumerate(hosts)]
        whole = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        assert equal(whole, one.batch(step))


@LAYOUTS
def test_an_epoch_holds_every_token_once_and_the_next_in_another_order(folder, layout):
    split = open_dataset(folder).split("train")
    pipeline = pipeline_of(split, layout)
    plan = pipeline.plans[32]
    rows = np.arange(plan.rows_per_epoch)
    orders = [plan.shuffled(1, np.full_like(rows, epoch), rows) for epoch in (0, 1)]
    assert all(sorted(order) == rows.tolist() for order in orders)
    assert (orders[0] != orders[1]).any()
    text = sum(
        int(part.views(1, np.zeros_like(local), local)[1].sum())
        for part, _, local in plan.parts(rows)
    )
    assert text == split.tokens


def test_rows_are_shuffled_within_windows_and_windows_hold_sections_from_anywhere(tmp_path):
    split = make_split(tmp_path / "data", np.full(320, 30))
    # 320 documents, 1 a section, 16 sections a window: 16 rows a window, none of them padded.
    plan = pipeline_of(split, Documents(), window_tokens=16 * 30).plans[32]
    rows = np.arange(320)
    order = plan.shuffled(5, np.zeros_like(rows), rows)
    windows = order.reshape(20, 16)
    assert not any((np.diff(window) > 0).all() for window in windows)
    # Neighbouring documents fall into different windows: 15 in 319 pairs would not, by chance.
    together = sum(1 in abs(np.subtract.outer(w, w)) for w in windows)
    assert together < 19


def test_memory_holds_two_windows_at_most(server):
    split = open_dataset(server.url).split("train")
    pipeline = pipeline_of(split, Blocks(), window_tokens=160)
    reader = pipeline.plans[32].reader
    most = 0
    for _ in pipeline.iterate(0, 60):
        with reader._lock:  # while it asks for new ones, it has not yet forgotten old ones
            most = max(most, len(reader._texts))
    assert len(reader.sections) > 50 and 16 < most <= 32


def test_the_next_window_is_read_before_it_is_used(server):
    server.delay_seconds = DELAY_SECONDS
    split = open_dataset(server.url).split("train")
    pipeline = pipeline_of(split, Blocks(), window_tokens=320)
    plan = pipeline.plans[32]
    batch = np.zeros(4, np.int64), np.arange(4)
    plan.read_ahead(1, *batch)
    deadline = time.monotonic() + 20
    while not all(f.done() for f in plan.reader._texts.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    asked = len(server.requests)
    epoch = np.zeros(20, np.int64)
    # All of the first window and the beginning of the second.
    for part, _, local in plan.parts(plan.shuffled(1, epoch, np.arange(20))):
        part.rows(1, np.zeros_like(local), local)
    assert len(server.requests) == asked


def test_evaluation_reads_all_rows_in_order(server, folder):
    near, far = (
        list(evaluation_batches(open_dataset(d).split("train"), Documents(), framing_of(32), 16, 0))
        for d in (folder, server.url)
    )
    assert len(near) == len(far) and all(map(equal, near, far))


def test_moments_of_failure_are_outlived(server, folder):
    server.fail_every = 3
    far = pipeline_of(open_dataset(server.url).split("train"), Blocks())
    near = pipeline_of(open_dataset(folder).split("train"), Blocks())
    assert equal(far.batch(0), near.batch(0))


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_store_that_refuses_is_told_in_one_line(server, status):
    server.fail_every, server.fail_status = 1, status
    match = f"{server.url}/dataset.json cannot be read .*{status}"
    with pytest.raises(UserError, match=match) as e:
        open_dataset(server.url)
    assert "\n" not in str(e.value)
    assert len(server.requests) == (8 if status == 500 else 1)


def test_a_missing_dataset_and_a_missing_object_are_told(server, folder):
    with pytest.raises(UserError, match="elsewhere is no dataset: it holds no dataset.json"):
        open_dataset(f"{server.url}/elsewhere")
    (folder / "train-00001.words").unlink()
    with pytest.raises(UserError, match="train-00001.words is missing; dataset.json names"):
        open_dataset(server.url)


def test_a_cut_object_is_told(server, folder):
    path = folder / "train-00000.ids"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="train-00000.ids is damaged: it has .* bytes instead of"):
        open_dataset(server.url)


def test_a_server_that_cuts_answers_or_serves_no_ranges_is_told(server):
    split = open_dataset(server.url).split("train")
    server.cut_bytes = 1
    with pytest.raises(UserError, match="bytes came of"):
        pipeline_of(split, Blocks()).batch(0)
    server.cut_bytes, server.ranges = 0, False
    with pytest.raises(UserError, match="does not serve ranges"):
        pipeline_of(split, Blocks()).batch(0)


def test_a_copy_that_was_interrupted_is_made_again(server, folder, tmp_path):
    split = open_dataset(server.url).split("train")
    server.fail_every, server.fail_status = 1, 403
    with pytest.raises(UserError, match="403"):
        _ = split.document_offsets
    server.fail_every = 0
    split = open_dataset(server.url).split("train")
    original = open_dataset(folder).split("train").document_offsets
    assert (split.document_offsets[:] == original[:]).all()
    copies = [p.name for p in (tmp_path / "home").rglob("*.documents")]
    asked = len(server.requests)
    assert copies and len(open_dataset(server.url).split("train").document_offsets)
    assert not [r for r in server.requests[asked:] if "GET" in r and "documents" in r]


def test_an_unknown_kind_of_url_is_told():
    with pytest.raises(UserError, match="nothing installed reads nowhere://"):
        open_dataset("nowhere://bucket/data")


def test_a_dataset_at_a_url_gets_a_window_and_urls_stay_whole():
    assert Data(layout=Blocks(), folder="gs://bucket/data").window_tokens == 1 << 26
    assert Data(layout=Blocks(), folder="gs://bucket/data", window_tokens=7).window_tokens == 7
    assert Data(layout=Blocks(), folder="data").window_tokens is None
    assert joined("gs://bucket", "part") == "gs://bucket/part"
    assert joined("gs://bucket", "s3://other/part") == "s3://other/part"
