"""Text in a store gives the documents that it gives on the disk, and failures end in one line."""

import gzip

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from benchmarks.range_server import RangeServer
from flaxpretrain.data import lines, remote_text
from flaxpretrain.data.files import RemoteFiles
from flaxpretrain.data.sources import text_files
from flaxpretrain.errors import UserError

TEXT = "\n".join(f"sentence {n} says this ." + "\n" * (n % 3 == 0) for n in range(3000)) + "\n"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(RemoteFiles, "first_pause_seconds", 0.001)
    # Several requests a file.
    monkeypatch.setattr(remote_text, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(lines, "BLOCK", 1 << 14)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "text"
    (folder / "more").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "a.txt").write_text(TEXT)
    (folder / ".hidden" / "x.txt").write_text("not this\n")
    with gzip.open(folder / "b.txt.gz", "wt") as file:
        file.write(TEXT.upper())
    (folder / "c.jsonl").write_text('{"text": "one\\ntwo"}\n{"text": "three"}\n')
    (folder / "more" / "d.csv").write_text('text,n\n"a, b",1\n')
    table = pyarrow.table({"text": [f"row {n}" for n in range(2000)]})
    pyarrow.parquet.write_table(table, folder / "e.parquet", row_group_size=300)
    return folder


@pytest.fixture
def server(folder):
    remote_text._files.cache_clear()
    with RangeServer(folder) as server:
        yield server


@pytest.fixture
def bucket(folder):
    """The folder in a store that lists its files."""
    remote_text._files.cache_clear()
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/", "/bucket/text", recursive=True)
    yield "memory://bucket/text"
    memory.rm("/bucket", recursive=True)


def read(source):
    return list(source.documents())


@pytest.mark.parametrize("name", ["a.txt", "b.txt.gz", "c.jsonl", "more/d.csv", "e.parquet"])
def test_a_file_behind_a_url_is_the_file(server, folder, name):
    far, near = text_files(f"{server.url}/{name}"), text_files(folder / name)
    told = []
    assert list(far.documents(told.append)) == read(near)
    assert far.size() == near.size() == sum(told)
    assert far.name == near.name or name == "more/d.csv" or far.name == name.rpartition("/")[2]


def test_a_folder_of_a_store_is_read_in_the_order_of_its_paths(bucket, folder):
    far = text_files(bucket)
    assert [str(path).removeprefix(bucket) for path in far.paths] == [
        *("/a.txt", "/b.txt.gz", "/c.jsonl", "/e.parquet", "/more/d.csv")
    ]
    assert far.name == "text" and read(far) == read(text_files(folder))
    shards = [text_files(bucket).shard(number, 2) for number in (0, 1)]
    assert sorted(map(str, read(far))) == sorted(str(d) for s in shards for d in read(s))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.txt", ["a.txt"]),
        ("*.txt*", ["a.txt", "b.txt.gz"]),
        ("[ac].*", ["a.txt", "c.jsonl"]),
        ("**/*.csv", ["more/d.csv"]),
        ("?.jsonl", ["c.jsonl"]),
    ],
)
def test_a_pattern_picks_files(bucket, pattern, names):
    assert [str(path) for path in text_files(f"{bucket}/{pattern}").paths] == [
        f"{bucket}/{name}" for name in names
    ]


# gcsfs asks for credentials that the emulator does not need.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_bucket_of_googles_is_read_by_pattern_and_as_a_folder(folder, tmp_path, monkeypatch):
    pytest.importorskip("gcsfs", reason="pip install gcsfs gcp-storage-emulator")
    pytest.importorskip("gcp_storage_emulator", reason="pip install gcsfs gcp-storage-emulator")
    from tests.training.bucket import serving

    remote_text._files.cache_clear()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with serving(monkeypatch):
        fsspec.filesystem("gs").clear_instance_cache()
        system = fsspec.filesystem("gs")
        for name in ("a.txt", "b.txt.gz", "c.jsonl", "e.parquet", "more/d.csv"):
            system.pipe_file(f"bucket/text/{name}", (folder / name).read_bytes())
        assert read(text_files("gs://bucket/text")) == read(text_files(folder))
        (only,) = text_files("gs://bucket/text/*.txt").paths
        assert str(only) == "gs://bucket/text/a.txt"
        remote_text._files.cache_clear()


def test_a_bucket_of_amazons_is_read_by_pattern_and_as_a_folder(folder, monkeypatch):
    from tests.data.amazon import serving

    remote_text._files.cache_clear()
    with serving(monkeypatch, folder):
        assert read(text_files("s3://bucket")) == read(text_files(folder))
        (only,) = text_files("s3://bucket/*.txt").paths
        assert str(only) == "s3://bucket/a.txt"
        remote_text._files.cache_clear()


def test_a_page_that_lists_files_is_a_folder(server, folder):
    far = text_files(f"{server.url}/")
    assert read(far) == read(text_files(folder))
    assert [path.name for path in text_files(f"{server.url}/*.txt").paths] == ["a.txt"]


def test_a_query_is_no_part_of_a_name(server):
    path = remote_text.RemotePath(server.url, "a.jsonl.gz?key=1.2", 5)
    assert path.suffixes == [".jsonl", ".gz"] and path.suffix == ".gz"


@pytest.mark.parametrize("url", ["memory://bucket/text/none", "memory://bucket/text/*.none"])
def test_what_is_not_there_is_told(bucket, url):
    with pytest.raises(UserError, match="is no file and no folder with files"):
        text_files(url)


def test_a_missing_page_and_an_unknown_scheme_are_told(server):
    with pytest.raises(UserError, match=r"none.txt is no file and no folder"):
        text_files(f"{server.url}/none.txt")
    with pytest.raises(UserError, match="nothing installed reads nowhere://"):
        text_files("nowhere://bucket/a.txt")


def test_moments_of_failure_are_outlived(server, folder):
    source = text_files(f"{server.url}/a.txt")
    server.fail_every = 3
    assert read(source) == read(text_files(folder / "a.txt"))


@pytest.mark.parametrize("status", [403, 503])
@pytest.mark.parametrize("name", ["a.txt", "b.txt.gz", "e.parquet"])
def test_a_store_that_goes_on_failing_is_told_in_one_line_after_some_tries(server, name, status):
    source = text_files(f"{server.url}/{name}")
    asked = len(server.requests)
    server.fail_every, server.fail_status = 1, status
    with pytest.raises(UserError, match=f"{server.url}/{name} cannot be read .*{status}") as e:
        read(source)
    assert "\n" not in str(e.value)
    assert len(server.requests) - asked == (8 if status == 503 else 1)


def test_a_server_without_ranges_is_told(server):
    source = text_files(f"{server.url}/e.parquet")
    server.ranges = False
    with pytest.raises(UserError, match="does not serve ranges"):
        read(source)
