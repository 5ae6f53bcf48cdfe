"""Tokenizers: special ids are read, text stays text, and Transformers loads what we save."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from flaxpretrain.data import tokenizers
from flaxpretrain.data.normalization import Normalization
from flaxpretrain.data.tokenizer_training import train_bpe, train_unigram, train_wordpiece
from flaxpretrain.errors import UserError

TEXTS = [
    "The river runs through the old town, and the bridge is older than the town.",
    "A café on the river sells coffee; the naïve visitor pays twice.",
    "Nobody knows who built the bridge over the river, or when it was built.",
    "Unbelievable, unbuildable, rebuilt: words are built from pieces.",
] * 5
TRAINERS = {
    "wordpiece": lambda: train_wordpiece(TEXTS, 150),
    "wordpiece cased": lambda: train_wordpiece(TEXTS, 150, normalization=Normalization()),
    "bpe": lambda: train_bpe(TEXTS, 350),
    "unigram": lambda: train_unigram(TEXTS, 120, sentinels=3),
}


@pytest.fixture(scope="module", params=list(TRAINERS))
def tokenizer(request):
    return TRAINERS[request.param]()


@pytest.fixture(scope="module")
def wordpiece():
    return TRAINERS["wordpiece"]()


def write_vocab(path, tokens):
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


def test_encodes_back_to_back_without_special_tokens(tokenizer):
    ids, lengths = tokenizer.encode_sentences(TEXTS[:3])
    assert len(ids) == lengths.sum() and (lengths > 0).all()
    expected = [tokenizer.backend.encode(text, add_special_tokens=False).ids for text in TEXTS[:3]]
    assert np.split(ids, np.cumsum(lengths)[:-1])[1].tolist() == expected[1]
    assert ids.tolist() == sum(expected, [])


def test_text_that_spells_special_tokens_stays_text(tokenizer):
    vocabulary = tokenizer.vocabulary
    sentences = [f"the {tokenizer.backend.id_to_token(i)} river" for i in vocabulary.special_ids]
    ids, lengths = tokenizer.encode_sentences([*sentences, "<extra_id_0>[MASK]</s><pad>"])
    forbidden = set(vocabulary.special_ids) - {vocabulary.unk}
    assert not forbidden & set(ids.tolist())
    assert (lengths > 2).all()


def test_vocabulary_size_is_the_tokenizers_own(tokenizer):
    assert tokenizer.vocabulary.size == tokenizer.backend.get_vocab_size()


def test_save_and_load_keep_everything(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = tokenizers.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.vocabulary == tokenizer.vocabulary
    assert loaded.roles == tokenizer.roles
    np.testing.assert_array_equal(loaded.word_starts, tokenizer.word_starts)


def test_pickling_keeps_everything(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(
        copy.encode_sentences(TEXTS)[0], tokenizer.encode_sentences(TEXTS)[0]
    )


def test_transformers_loads_it_encodes_equally_and_frames(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    vocabulary = tokenizer.vocabulary
    assert len(loaded) == vocabulary.size
    for role in vocabulary.TOKENS:
        assert getattr(loaded, f"{role}_token_id") == getattr(vocabulary, role)
    for text in TEXTS[:4]:
        ids, _ = tokenizer.encode_sentences([text])
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids.tolist()
        before = [] if vocabulary.cls is None else [vocabulary.cls]
        after = [vocabulary.eos if vocabulary.sep is None else vocabulary.sep]
        assert loaded(text)["input_ids"] == before + ids.tolist() + after
        assert loaded(text)["input_ids"] == tokenizer.backend.encode(text).ids
    if vocabulary.mask is not None:
        masked = loaded(f"the {loaded.mask_token} runs", add_special_tokens=False)["input_ids"]
        assert masked.count(vocabulary.mask) == 1
        assert (
            masked
            == tokenizer.backend.encode(
                f"the {loaded.mask_token} runs", add_special_tokens=False
            ).ids
        )


def test_word_starts_mark_the_first_piece_of_every_word(tokenizer):
    ids, _ = tokenizer.encode_sentences(["when nobody builds the unbuildable bridge"])
    opens = tokenizer.word_starts[ids]
    # A byte-level BPE sees a word's opening by its space, which the first word has not.
    opens[0] = True
    assert opens.sum() == 6


def test_special_tokens_open_words(tokenizer):
    assert tokenizer.word_starts[list(tokenizer.vocabulary.special_ids)].all()


def test_wordpiece_writes_its_vocabulary_as_text(wordpiece, tmp_path):
    wordpiece.save(tmp_path)
    assert (tmp_path / "vocab.txt").read_text(encoding="utf-8").startswith("[PAD]\n[UNK]\n[CLS]\n")
    again = tokenizers.load(tmp_path / "vocab.txt")
    assert again.fingerprint == wordpiece.fingerprint


def test_roles_of_each_family():
    roberta = TRAINERS["bpe"]().vocabulary
    assert (roberta.cls, roberta.pad, roberta.sep, roberta.unk) == (0, 1, 2, 3)
    assert (roberta.bos, roberta.eos) == (roberta.cls, roberta.sep)
    bert = TRAINERS["wordpiece"]().vocabulary
    assert bert.special_ids == (0, 1, 2, 3, 4) and bert.bos is None and bert.eos is None


def test_sentinels_descend_from_the_last_id():
    tokenizer = TRAINERS["unigram"]()
    size = tokenizer.vocabulary.size
    assert tokenizer.vocabulary.sentinels == (size - 1, size - 2, size - 3)
    assert tokenizer.backend.id_to_token(size - 1) == "<extra_id_0>"
    assert set(tokenizer.vocabulary.sentinels) <= set(tokenizer.vocabulary.special_ids)


@pytest.mark.parametrize("name", ["wordpiece", "bpe"])
def test_training_gives_the_same_file_in_every_process(name):
    program = (
        "from flaxpretrain.data.tokenizer_training import train_bpe, train_wordpiece;"
        f"train = {{'wordpiece': train_wordpiece, 'bpe': train_bpe}}[{name!r}];"
        f"print(train(iter({TEXTS!r}), 320).fingerprint)"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(3)
    }
    assert len(runs) == 1


def test_lower_case_and_accents_follow_the_options(tmp_path):
    path = write_vocab(tmp_path / "vocab.txt", ["[PAD]", "[UNK]", "cafe", "café", "Cafe", "Café"])
    for lowercase, strip, expected in [
        (True, None, "cafe"),
        (None, None, "cafe"),
        (True, False, "café"),
        (False, None, "Café"),
        (False, True, "Cafe"),
    ]:
        loaded = tokenizers.load(path, lowercase, strip)
        ids, _ = loaded.encode_sentences(["Café"])
        assert [loaded.backend.id_to_token(int(i)) for i in ids] == [expected]


def test_a_folder_without_tokenizer_json_reads_its_settings(tmp_path):
    write_vocab(tmp_path / "vocab.txt", ["[PAD]", "[UNK]", "cafe", "Café"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert tokenizers.load(tmp_path).encode_sentences(["Café"])[0].tolist() == [3]


def test_chinese_characters_are_words(tmp_path):
    path = write_vocab(tmp_path / "vocab.txt", ["[PAD]", "[UNK]", "中", "国"])
    tokenizer = tokenizers.load(path)
    ids, _ = tokenizer.encode_sentences(["中国"])
    assert ids.tolist() == [2, 3] and tokenizer.word_starts[ids].all()


def test_bad_vocabularies_are_named(tmp_path):
    with pytest.raises(UserError, match=r"vocab.txt holds no \[UNK\]"):
        tokenizers.load(write_vocab(tmp_path / "vocab.txt", ["a", "b"]))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="bad.txt is not UTF-8"):
        tokenizers.load(tmp_path / "bad.txt")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json is no tokenizer"):
        tokenizers.load(tmp_path / "tokenizer.json")


def test_what_cannot_be_found_is_named(tmp_path):
    for name in (tmp_path / "nowhere", "nowhere.txt", "nowhere/tokenizer.json"):
        with pytest.raises(UserError, match="no tokenizer .*nowhere.*: no such file"):
            tokenizers.load(name)
    with pytest.raises(UserError, match="no tokenizer 'nobody/nothing'"):
        tokenizers.load("nobody/nothing")


def test_options_that_do_not_apply_are_refused(wordpiece, tmp_path):
    wordpiece.save(tmp_path)
    with pytest.raises(UserError, match="own normaliser"):
        tokenizers.load(tmp_path, lowercase=False)


def test_a_role_without_its_token_is_named(wordpiece, tmp_path):
    wordpiece.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<go>"}))
    with pytest.raises(UserError, match="'<go>' as bos token"):
        tokenizers.load(tmp_path)


def test_training_needs_text_and_room():
    with pytest.raises(UserError, match="no text"):
        train_wordpiece([], 100)
    with pytest.raises(UserError, match="vocabulary of 20 is too small"):
        train_wordpiece(TEXTS, 20)
    with pytest.raises(UserError, match="vocabulary of 200 is too small"):
        train_bpe(TEXTS, 200)
    with pytest.raises(UserError, match="<unk>"):
        train_unigram(TEXTS, 100, special_tokens=("<pad>",))


def test_special_ids_in_an_unusual_order_are_read(test_data):
    vocabulary = tokenizers.load(test_data / "vocab" / "beto" / "vocab.txt").vocabulary
    assert (vocabulary.mask, vocabulary.pad, vocabulary.eos, vocabulary.unk) == (0, 1, 2, 3)
    assert vocabulary.special_ids == (0, 1, 2, 3, 4, 5)


@pytest.mark.hf
@pytest.mark.parametrize("folder, lowercase", [("bert-base-uncased", True), ("beto", False)])
def test_vocab_txt_encodes_as_transformers_does(test_data, folder, lowercase):
    from transformers import BertTokenizer

    path = test_data / "vocab" / folder / "vocab.txt"
    ours = tokenizers.load(path, lowercase=lowercase)
    vocabulary = {token: i for i, token in enumerate(path.read_text("utf-8").splitlines())}
    theirs = BertTokenizer(vocab=vocabulary, do_lower_case=lowercase)
    name = "es_novels_eltec" if folder == "beto" else "en_wikipedia_2018"
    with (test_data / name / "valid.txt").open(encoding="utf-8") as file:
        lines = [line.rstrip("\n") for _, line in zip(range(300), file, strict=False)]
    ids, lengths = ours.encode_sentences(lines)
    expected = [theirs(line, add_special_tokens=False)["input_ids"] for line in lines]
    assert lengths.tolist() == list(map(len, expected))
    assert ids.tolist() == sum(expected, [])


@pytest.mark.hf
def test_vocab_json_and_merges_encode_as_transformers_does(test_data):
    from tokenizers import AddedToken
    from transformers import RobertaTokenizer

    folder = test_data / "vocab" / "roberta-base"
    ours = tokenizers.load(folder)
    merges = [
        tuple(line.split(" "))
        for line in (folder / "merges.txt").read_text("utf-8").split("\n")
        if line and not line.startswith("#version")
    ]
    theirs = RobertaTokenizer(
        vocab=json.loads((folder / "vocab.json").read_text()),
        merges=merges,
        # As roberta-base has it on the hub.
        mask_token=AddedToken("<mask>", lstrip=True),
    )
    assert ours.vocabulary.special_ids == (0, 1, 2, 3, 50264)
    assert (ours.vocabulary.cls, ours.vocabulary.pad, ours.vocabulary.mask) == (0, 1, 50264)
    for text in TEXTS[:4] + ["a <mask> b", "  two  spaces"]:
        assert ours.backend.encode(text).ids == theirs(text)["input_ids"]
    assert ours.backend.encode("a", "b").ids == theirs("a", "b")["input_ids"]
