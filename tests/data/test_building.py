"""The builder: the text alone decides the files; nothing half-written ever looks whole."""

import errno
import hashlib
import json

import numpy as np
import pytest

from flaxpretrain.data import encoding, store_writer
from flaxpretrain.data.building import BuildSettings, Provenance, build
from flaxpretrain.data.sources import text_files
from flaxpretrain.data.store import open_dataset, partial_folder
from flaxpretrain.data.summary import counts, padding, specials_per_piece
from flaxpretrain.data.tokenizer_training import train_bpe, train_wordpiece
from flaxpretrain.errors import UserError

WORDS = (
    "river bridge town older water visitor coffee unbuildable café naïve 中文 , . ! of the".split()
)
SETTINGS = BuildSettings(validation_share=0.2, shard_bytes=400)


def make_documents(count=60):
    random = np.random.default_rng(0)
    return [
        [
            " ".join(random.choice(WORDS, random.integers(1, 12)))
            for _ in range(random.integers(1, 6))
        ]
        for _ in range(count)
    ]


DOCUMENTS = make_documents()


def write(folder, documents, per_file):
    folder.mkdir(parents=True)
    for number, first in enumerate(range(0, len(documents), per_file)):
        text = "\n\n".join("\n".join(d) for d in documents[first : first + per_file])
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return text_files(folder)


def hashes(folder):
    """Hash of every file of a dataset, by its path in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks a shard, as it is with real text."""
    monkeypatch.setattr(encoding, "CHUNK", 200)


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece((s for d in DOCUMENTS for s in d), 120)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "corpus", DOCUMENTS, per_file=25)


@pytest.fixture
def reference(source, tokenizer, tmp_path):
    return build([source], tokenizer, tmp_path / "reference", SETTINGS)


def test_every_token_of_every_document_is_there_once(reference, tokenizer):
    documents = {tuple(d): tokenizer.encode_sentences(d) for d in DOCUMENTS}
    found = []
    for split in reference.splits.values():
        stream, _ = split.gather(np.array([0]), np.array([split.tokens]), split.tokens)
        found += [tuple(ids) for ids in np.split(stream[0], split.document_offsets[1:-1])]
    assert sorted(found) == sorted(tuple(documents[tuple(d)][0]) for d in DOCUMENTS)
    totals = [
        sum(getattr(s, n) for s in reference.splits.values()) for n in ("documents", "sentences")
    ]
    assert totals == [len(DOCUMENTS), sum(map(len, DOCUMENTS))]
    assert sum(s.bytes for s in reference.splits.values()) == sum(
        len("\n".join(d).encode()) for d in DOCUMENTS
    )


def test_documents_keep_their_order_and_sentences_their_borders(reference, tokenizer):
    train = reference.split("train")
    stream, word_starts = train.gather(np.array([0]), np.array([train.tokens]), train.tokens)
    texts = {tuple(tokenizer.encode_sentences(d)[0]): d for d in DOCUMENTS}
    order = [texts[tuple(ids)] for ids in np.split(stream[0], train.document_offsets[1:-1])]
    positions = [DOCUMENTS.index(d) for d in order]
    assert positions == sorted(positions)
    lengths = np.concatenate([tokenizer.encode_sentences(d)[1] for d in order])
    assert train.sentence_offsets[:].tolist() == [0, *np.cumsum(lengths)]
    opens = tokenizer.word_starts[stream[0]]
    opens[train.sentence_offsets[:-1]] = True
    np.testing.assert_array_equal(word_starts[0], opens)


def test_there_are_several_shards_and_a_validation_split(reference):
    assert len(reference.split("train").shards) > 3
    assert 3 < reference.split("validation").documents < 25
    reference.verify()


@pytest.mark.parametrize("per_file", [1, 7, 60])
def test_the_layout_in_files_leaves_no_trace(reference, tokenizer, tmp_path, per_file):
    source = write(tmp_path / "other" / "corpus", DOCUMENTS, per_file)
    dataset = build([source], tokenizer, tmp_path / "data", SETTINGS)
    assert hashes(dataset.folder) == hashes(reference.folder)


@pytest.mark.parametrize("chunk", [1, 100, 3000])
def test_the_size_of_chunks_leaves_no_trace(
    reference, source, tokenizer, tmp_path, chunk, monkeypatch
):
    monkeypatch.setattr(encoding, "CHUNK", chunk)
    dataset = build([source], tokenizer, tmp_path / "data", SETTINGS)
    assert hashes(dataset.folder) == hashes(reference.folder)


def test_the_number_of_processes_leaves_no_trace(
    reference, source, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(encoding, "CHUNK", 500)
    dataset = build([source], tokenizer, tmp_path / "data", SETTINGS, num_processes=3)
    assert hashes(dataset.folder) == hashes(reference.folder)


def test_the_split_depends_on_content_and_seed_alone(source, reference, tokenizer, tmp_path):
    backwards = write(tmp_path / "backwards", DOCUMENTS[::-1], per_file=9)
    other = build([backwards], tokenizer, tmp_path / "other", SETTINGS)
    assert other.split("validation").tokens == reference.split("validation").tokens
    seeded = build([source], tokenizer, tmp_path / "seeded", BuildSettings(0.2, seed=1))
    assert seeded.split("validation").tokens != reference.split("validation").tokens
    whole = build([source], tokenizer, tmp_path / "whole", BuildSettings(validation_share=0))
    assert list(whole.splits) == ["train"] and whole.split("train").documents == len(DOCUMENTS)


def test_a_limit_counts_documents_over_all_sources(source, tokenizer, tmp_path):
    settings = BuildSettings(validation_share=0, limit=70)
    dataset = build([source, source], tokenizer, tmp_path / "data", settings)
    assert [entry["documents"] for entry in dataset.metadata["sources"]] == [60, 10]
    assert dataset.split("train").documents == 70


def test_sentences_without_a_token_are_none(tokenizer, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("\u200b\x01\n\nriver\n\x01\ntown\n\n\x02\n\nbridge\n")
    settings = BuildSettings(validation_share=0)
    train = build([text_files(folder)], tokenizer, tmp_path / "data", settings).split("train")
    assert (train.documents, train.sentences) == (2, 3)
    assert (np.diff(train.sentence_offsets) > 0).all()


def test_metadata_says_where_it_comes_from_and_names_no_path(source, tokenizer, tmp_path):
    origin = Provenance("CC-BY-SA-3.0", "Wikipedia contributors", "en")
    dataset = build([source], tokenizer, tmp_path / "data", SETTINGS, origin)
    metadata = dataset.metadata
    assert (metadata["licence"], metadata["language"]) == ("CC-BY-SA-3.0", "en")
    assert metadata["attribution"] == "Wikipedia contributors"
    assert metadata["sources"][0]["name"] == "corpus"
    assert metadata["build"]["validation_share"] == 0.2
    assert metadata["fingerprint"] == tokenizer.fingerprint
    for name in ("dataset.json", "tokenizer/tokenizer_config.json"):
        assert str(tmp_path) not in (dataset.folder / name).read_text()


def test_text_that_spells_special_tokens_adds_none(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("the [MASK] river [SEP] <pad>\n")
    settings = BuildSettings(validation_share=0)
    source = text_files(tmp_path / "a.txt")
    train = build([source], tokenizer, tmp_path / "data", settings).split("train")
    stream, _ = train.gather(np.array([0]), np.array([train.tokens]), train.tokens)
    special = set(tokenizer.vocabulary.special_ids) - {tokenizer.vocabulary.unk}
    assert not special & set(stream[0].tolist())


class _Killed(BaseException):
    pass


def interrupt_after(monkeypatch, shards, error):
    """Makes the writing of shards end with an error after so many are closed."""
    close = store_writer.ShardWriter.close
    closed = []

    def closing(self):
        if len(closed) == shards:
            raise error
        closed.append(self.name)
        return close(self)

    monkeypatch.setattr(store_writer.ShardWriter, "close", closing)
    return closed


@pytest.mark.parametrize("shards", [0, 1, 3, 6])
def test_an_interrupted_build_goes_on_and_gives_the_same_files(
    reference, source, tokenizer, tmp_path, monkeypatch, shards
):
    output = tmp_path / "data"
    with monkeypatch.context() as patch:
        interrupt_after(patch, shards, _Killed())
        with pytest.raises(_Killed):
            build([source], tokenizer, output, SETTINGS)
    assert not output.exists()
    with pytest.raises(UserError, match="unfinished"):
        open_dataset(output)
    messages = []
    closed = interrupt_after(monkeypatch, 1000, _Killed())
    dataset = build([source], tokenizer, output, SETTINGS, notify=messages.append)
    assert hashes(dataset.folder) == hashes(reference.folder)
    # The last shard of each split ends with the text, not by its size: it is always written anew.
    last = len(reference.splits)
    total = sum(len(split.shards) for split in reference.splits.values())
    assert len(closed) == total - min(shards, total - last)
    assert len(messages) == (shards > 0)
    assert not partial_folder(output).exists()


def test_a_full_disk_is_one_clear_line_and_the_build_goes_on_later(
    reference, source, tokenizer, tmp_path, monkeypatch
):
    output = tmp_path / "data"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(UserError, match="no space is left"):
            build([source], tokenizer, output, SETTINGS)
    assert not output.exists()
    dataset = build([source], tokenizer, output, SETTINGS)
    assert hashes(dataset.folder) == hashes(reference.folder)


def interrupted(source, tokenizer, output, monkeypatch, shards=2):
    with monkeypatch.context() as patch:
        interrupt_after(patch, shards, _Killed())
        with pytest.raises(_Killed):
            build([source], tokenizer, output, SETTINGS)


def test_other_settings_start_anew_and_say_so(source, tokenizer, tmp_path, monkeypatch):
    output = tmp_path / "data"
    interrupted(source, tokenizer, output, monkeypatch)
    messages = []
    settings = BuildSettings(validation_share=0.5, shard_bytes=400)
    dataset = build([source], tokenizer, output, settings, notify=messages.append)
    assert messages == [
        "starting anew: the interrupted build differs "
        "(build.validation_share: 0.2 there, 0.5 wanted)"
    ]
    dataset.verify()


def test_a_damaged_shard_starts_anew(reference, source, tokenizer, tmp_path, monkeypatch):
    output = tmp_path / "data"
    interrupted(source, tokenizer, output, monkeypatch)
    (partial_folder(output) / "dataset" / "train-00000.ids").write_bytes(b"")
    messages = []
    dataset = build([source], tokenizer, output, SETTINGS, notify=messages.append)
    assert "train-00000.ids is damaged" in messages[0]
    assert hashes(dataset.folder) == hashes(reference.folder)


def test_changed_text_is_refused_when_going_on(source, tokenizer, tmp_path, monkeypatch):
    output = tmp_path / "data"
    interrupted(source, tokenizer, output, monkeypatch)
    source.paths[0].write_text("Something else.\n", encoding="utf-8")
    with pytest.raises(UserError, match="not that of the interrupted build"):
        build([source], tokenizer, output, SETTINGS)
    for path in source.paths:
        path.write_text("One line is left.\n")
    with pytest.raises(UserError, match="not that of the interrupted build"):
        build([source], tokenizer, output, SETTINGS)


def test_building_again_finds_it_built(reference, source, tokenizer):
    before = {path: path.stat().st_mtime_ns for path in reference.folder.rglob("*")}
    messages = []
    build([source], tokenizer, reference.folder, SETTINGS, notify=messages.append)
    assert "built already" in messages[0]
    assert before == {path: path.stat().st_mtime_ns for path in reference.folder.rglob("*")}


def test_another_dataset_is_not_overwritten_unasked(reference, source, tokenizer):
    folder = reference.folder
    other = BuildSettings(validation_share=0.3)
    with pytest.raises(UserError, match="validation_share: 0.2 there, 0.3 wanted.*--overwrite"):
        build([source], tokenizer, folder, other)
    with pytest.raises(UserError, match="the tokenizer is another"):
        build([source], train_bpe(["a b"], 280), folder, SETTINGS)
    source.paths[0].write_text("Something else.\n")
    with pytest.raises(UserError, match="the text is another"):
        build([source], tokenizer, folder, SETTINGS)
    dataset = build([source], tokenizer, folder, other, overwrite=True)
    assert dataset.metadata["build"]["validation_share"] == 0.3
    dataset.verify()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_dataset_is_never_touched(source, tokenizer, tmp_path, overwrite):
    folder = tmp_path / "letters"
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is no dataset"):
        build([source], tokenizer, folder, SETTINGS, overwrite=overwrite)
    assert (folder / "letter.txt").read_text() == "dear"


def test_an_output_that_cannot_be_written_is_named(source, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/data: Not a directory"):
        build([source], tokenizer, tmp_path / "file" / "data", SETTINGS)


def test_two_builders_do_not_share_a_folder(source, tokenizer, tmp_path):
    import fcntl

    partial = partial_folder(tmp_path / "data")
    partial.mkdir()
    with (partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another build"):
            build([source], tokenizer, tmp_path / "data", SETTINGS)


def test_an_empty_corpus_is_named(tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n\n")
    with pytest.raises(UserError, match="no text to train on: the sources hold no document"):
        build([text_files(tmp_path / "empty.txt")], tokenizer, tmp_path / "data", SETTINGS)


def test_settings_out_of_range_are_refused(source, tokenizer, tmp_path):
    for settings, message in [
        ({"validation_share": 1.0}, "validation share"),
        ({"limit": 0}, "limit"),
        ({"shard_bytes": 0}, "shard_bytes"),
    ]:
        with pytest.raises(UserError, match=message):
            BuildSettings(**settings)
    with pytest.raises(UserError, match="--num-processes"):
        build([source], tokenizer, tmp_path / "data", SETTINGS, num_processes=0)


def test_a_mistake_in_the_text_ends_worker_processes_too(source, tokenizer, tmp_path):
    source.paths[-1].write_bytes(b"fine\n\xff\n")
    with pytest.raises(UserError, match="002.txt is not UTF-8: byte 5, line 2"):
        build([source], tokenizer, tmp_path / "data", SETTINGS, num_processes=2)


def test_the_summary_counts_tokens_and_padding(reference):
    train, validation = counts(reference)
    assert train.startswith("train: ") and f"{reference.split('train').tokens:,} tokens" in train
    assert validation.startswith("validation: ") and "0 lost" in validation
    blocks, packed, pairs, apart, alone = padding(reference, 16)
    assert "pairs packed" in pairs and "one a row" in apart
    assert float(pairs.split()[-2][:-1]) <= float(apart.split()[-2][:-1])
    shares = [float(line.split(" ")[-2].rstrip("%")) for line in (blocks, packed, alone)]
    assert shares[0] <= shares[1] <= shares[2]
    with pytest.raises(UserError, match="--max-seq-length 2"):
        padding(reference, 2)


def test_special_tokens_of_a_piece(tokenizer):
    assert specials_per_piece(tokenizer.vocabulary) == 2
    plain = train_bpe(["a b"], 280, special_tokens=["<|endoftext|>"]).vocabulary
    assert specials_per_piece(plain) == 1


def test_metadata_is_json_with_the_documented_fields(reference):
    metadata = json.loads((reference.folder / "dataset.json").read_text())
    assert set(metadata) == {
        "format", "fingerprint", "vocabulary", "dtype", "splits", "sources", "licence",
        "attribution", "language", "build",
    }  # fmt: skip
