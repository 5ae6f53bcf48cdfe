"""Records: JSON lines, tables, Parquet, compressed text; what is broken is named and counted."""

import gzip
import json
import lzma

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from flaxpretrain.data import document, lines
from flaxpretrain.data.records import Columns
from flaxpretrain.data.sources import Losses, Sampled, Strided, text_files
from flaxpretrain.errors import UserError

TEXTS = ["One.\nTwo, with ü and 中文.", "Three.", "Four.\r\n\nFive."]
DOCUMENTS = [("One.", "Two, with ü and 中文."), ("Three.",), ("Four.", "Five.")]
JSON_LINES = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS)


def read(source, losses=None):
    return [found.sentences for found in source.documents(losses=losses)]


def skipping():
    told = []
    return Losses(True, told.append), told


def zstd(data):
    half = len(data) // 2
    pack = zstandard.ZstdCompressor().compress
    return pack(data[:half]) + pack(data[half:])


PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", list(PACKERS))
@pytest.mark.parametrize("block", [3, 1 << 20])
def test_json_lines_and_text_may_be_compressed(tmp_path, suffix, block, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK", block)
    pack = PACKERS[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(JSON_LINES.encode()))
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(b"Six.\n\nSeven.\n"))
    source = text_files(tmp_path)
    told = []
    found = [d.sentences for d in source.documents(told.append)]
    assert found == [*DOCUMENTS, ("Six.",), ("Seven.",)]
    assert sum(told) == source.size()


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_compressed_file_cut_short_is_named_and_may_be_skipped(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK", 64)
    text = b"".join(b"line %d of them\n" % (n * 7919) for n in range(300))
    (tmp_path / f"a.txt{suffix}").write_bytes(PACKERS[suffix](text)[:-40])
    source = text_files(tmp_path, format="lines")
    with pytest.raises(UserError, match=rf"a.txt{suffix} is a broken \w+ file"):
        read(source)
    losses, told = skipping()
    assert len(read(source, losses)) < 300
    assert losses.counts() == {"broken": 1} and "is a broken" in told[0]


def write_table(path, texts, rows=1):
    table = arrow.table({"id": list(range(len(texts))), "text": texts})
    parquet.write_table(table, path, row_group_size=rows)


def test_parquet_is_read_by_its_text_column(tmp_path):
    write_table(tmp_path / "a.parquet", [*TEXTS, None, ""])
    source = text_files(tmp_path)
    losses, told = Losses(), []
    assert [d.sentences for d in source.documents(told.append, losses)] == DOCUMENTS
    assert sum(told) == source.size() and losses.counts() == {"empty": 2}
    with pytest.raises(UserError, match=r"no column 'body', it has id, text: .*--text-column"):
        read(text_files(tmp_path, columns=Columns("body")))


def test_lists_of_sentences_and_bytes_are_texts_too(tmp_path):
    table = arrow.table({"text": [["One.", "Two."], ["Three."]]})
    parquet.write_table(table, tmp_path / "a.parquet")
    parquet.write_table(arrow.table({"text": [b"b\xc3\xa4r", b"b\xe9d"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="b.parquet, row 1, field 'text': not UTF-8 at byte 1"):
        read(text_files(tmp_path))
    losses = Losses()
    found = read(text_files(tmp_path, errors="replace"), losses)
    assert found == [("One.", "Two."), ("Three.",), ("bär",), ("b\ufffdd",)]
    assert losses.counts() == {"replaced": 1}


BROKEN = {
    '{"text": "cut': "line 2: no JSON",
    '["text"]': "line 2: expected a JSON object a line, got list",
    '{"body": "x"}': "line 2: no field 'text', only body",
    '{"text": 3}': "line 2, field 'text': expected text, got int",
    r'{"text": "\ud800"}': "line 2, field 'text': half a surrogate pair",
    b'{"text": "b\xe9d"}': "is not UTF-8: byte",
    '{"text": "' + "x" * 500 + '"}': "line 2: longer than 200 bytes",
    "[" * 100_000: "line 2: longer than 200 bytes",
}


@pytest.mark.parametrize("line", BROKEN, ids=list(BROKEN.values()))
@pytest.mark.parametrize("block", [64, 1 << 20])
def test_a_broken_json_line_is_named_and_may_be_skipped(tmp_path, line, block, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK", 64 if "longer" in BROKEN[line] else block)
    monkeypatch.setattr(document, "LONGEST_LINE", 200)
    good = b'{"text": "Good."}\n'
    data = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(good + data + b"\n" + good)
    source = text_files(tmp_path)
    with pytest.raises(UserError) as error:
        read(source)
    assert BROKEN[line] in str(error.value) and "line 2" in str(error.value)
    assert "a.jsonl" in str(error.value) and "\n" not in str(error.value)
    losses, told = skipping()
    assert read(source, losses) == [("Good.",), ("Good.",)]
    assert losses.counts() == {"broken": 1} and len(told) == 1 and "a.jsonl" in told[0]


def test_a_line_of_fifty_megabytes_is_left_out_in_bounded_memory(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.write(b"before\n")
        for _ in range(50):
            file.write(b"x" * (1 << 20))
        file.write(b"\nafter\n\nlast\n")
    with pytest.raises(UserError, match="a.txt, line 2: longer than 16777216 bytes"):
        read(text_files(path))
    losses, told = skipping()
    assert read(text_files(path), losses) == [("before", "after"), ("last",)]
    assert losses.counts() == {"broken": 1}


def test_lines_in_another_encoding_are_left_out_or_replaced_one_by_one(tmp_path):
    (tmp_path / "a.txt").write_bytes("grün\n".encode() + "grün\n".encode("latin-1") * 2 + b"blau\n")
    losses, told = skipping()
    assert read(text_files(tmp_path), losses) == [("grün", "blau")]
    assert losses.counts() == {"broken": 2} and "line 3" in told[1]
    losses = Losses()
    found = read(text_files(tmp_path, errors="replace"), losses)
    assert found == [("grün", "gr\ufffdn", "gr\ufffdn", "blau")]
    assert losses.counts() == {"replaced": 2}


def test_broken_parquet_is_named_and_costs_its_rows_only(tmp_path):
    write_table(tmp_path / "b.parquet", [f"text {n} " * 50 for n in range(4)])
    data = bytearray((tmp_path / "b.parquet").read_bytes())
    begin = parquet.ParquetFile(tmp_path / "b.parquet").metadata.row_group(1).column(1)
    at = begin.dictionary_page_offset or begin.data_page_offset
    data[at : at + 40] = b"\xff" * 40
    (tmp_path / "b.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"b.parquet, rows 1 to 1: broken"):
        read(text_files(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match=r"a.parquet is no Parquet file, or a broken one"):
        read(text_files(tmp_path))
    losses, told = skipping()
    assert [text[0].split()[1] for text in read(text_files(tmp_path), losses)] == ["0", "2", "3"]
    assert losses.counts() == {"broken": 2} and len(told) == 2


def test_only_the_first_broken_things_are_told_one_by_one(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n" * 100 + JSON_LINES)
    losses, told = skipping()
    assert read(text_files(tmp_path), losses) == DOCUMENTS
    assert losses.broken_count == 100 and len(told) == 21 and "more than 20" in told[-1]


def test_pairs_come_from_two_columns_with_a_prefix(tmp_path):
    (tmp_path / "a.tsv").write_text("question\tlabel\twho\nWhat is it?\tnews\tme\nAnd\tit\tme\n")
    (tmp_path / "b.jsonl").write_text('{"question": "Two\\nlines ", "label": "other"}\n')
    (tmp_path / "c.csv").write_text('who,question,label\nme,"A, b?",it\n')
    source = text_files(tmp_path, columns=Columns("question", "label", "topic: "))
    assert read(source) == [
        ("topic: What is it?", "news"),
        ("topic: And", "it"),
        ("topic: Two lines", "other"),
        ("topic: A, b?", "it"),
    ]


def test_cells_in_quotes_may_hold_commas_and_line_ends(tmp_path):
    (tmp_path / "a.csv").write_text('text,id\r\n"One, two.\r\nThree.",1\r\n\r\nFour.,2\r\n')
    assert read(text_files(tmp_path)) == [("One, two.", "Three."), ("Four.",)]
    (tmp_path / "a.csv").write_text('text,id\nOne.,1\n"x" y,2\nTwo.,2\n"never closed,3\nlost\n')
    with pytest.raises(UserError, match="a.csv, line 3: no CSV"):
        read(text_files(tmp_path))
    losses, told = skipping()
    assert read(text_files(tmp_path), losses) == [("One.",), ("Two.",)]
    assert losses.counts() == {"broken": 2} and "a.csv, line 6: no CSV" in told[1]


PAIRS = {
    "a.tsv: columns": ("a\tb\nx\ty\tz\n", "a.tsv, line 2: 3 columns, where the first line names 2"),
    "a.tsv: names": (
        "c\tb\nx\ty\n",
        "a.tsv, whose first line names its columns, has no column 'a'",
    ),
    "a.tsv: empty": ("a\tb\nx\t \n", "a.tsv, line 2: field 'b' of a pair is empty"),
    "a.txt: text": ("x\n", "a.txt holds plain text, where --target-column asks for pairs"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_broken_pairs_are_named(tmp_path, name):
    (tmp_path / name.partition(":")[0]).write_text(PAIRS[name][0])
    with pytest.raises(UserError) as error:
        read(text_files(tmp_path, columns=Columns("a", "b")))
    assert PAIRS[name][1] in str(error.value)


def test_a_prefix_without_pairs_is_refused():
    with pytest.raises(UserError, match="--prefix 'x: ' is for pairs"):
        Columns(prefix="x: ")


def test_shards_hold_every_document_once(tmp_path):
    texts = [(f"text {n}",) for n in range(40)]
    for number in range(8):
        part = texts[number * 5 : number * 5 + 5]
        (tmp_path / f"{number}.txt").write_text("\n\n".join(t[0] for t in part))
    many, one = text_files(tmp_path), text_files(tmp_path / "0.txt")
    for source, kind in ((many, type(many)), (one, Strided), (Sampled(many, 0.5, 1), Sampled)):
        whole = sorted(read(source))
        for count in (1, 3, 4):
            shards = [source.shard(index, count) for index in range(count)]
            if count > 1 and not (source is many and count == 3):
                assert all(type(shard) is kind for shard in shards)
            assert sorted(d for shard in shards for d in read(shard)) == whole


def test_a_sample_is_picked_by_content_and_seed(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"text {n}" for n in range(1000)))
    source = text_files(tmp_path)
    tenth, half = (set(read(Sampled(source, share))) for share in (0.1, 0.5))
    assert 60 < len(tenth) < 140 and 430 < len(half) < 570 and tenth < half
    assert set(read(Sampled(source, 0.1, seed=1))) != tenth
    with pytest.raises(UserError, match="--sample"):
        Sampled(source, 0.0)
