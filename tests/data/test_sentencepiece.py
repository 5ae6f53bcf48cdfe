"""SentencePiece: its `.model` files cut text as SentencePiece does, here and in Transformers."""

import json

import numpy as np
import pytest

from flaxpretrain.data import tokenizers
from flaxpretrain.data.normalization import Normalization
from flaxpretrain.data.sentencepiece_model import read_model, roles_of
from flaxpretrain.data.tokenizer_training import train_sentencepiece
from flaxpretrain.errors import UserError

TEXTS = [
    "The river runs through the old town, and the bridge is older than the town.",
    "A café on the river sells coffee; the naïve visitor pays twice.",
    "Nobody knows who built the bridge over the river, or when it was built.",
    "IŞIK ve ISI: İstanbul, ılık. ﬁne  spaces",
] * 5
BERT_LIKE = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_LIKE = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
MODELS = {
    # folder and file; pad, cls, sep, mask, bos, eos, unk as the file has them
    "t5-base/spiece.model": (0, None, None, None, None, 1, 2),
    "albert-modified/30k-clean.model": (0, 2, 3, 4, None, None, 1),
    "xlnet/spiece.model": (5, 3, 4, 6, 1, 2, 0),
    "c4-unigram-or-bpe-32k/bpe_32k_c4.model": (0, None, None, 3, None, 1, 2),
    "sentencepiece-test/test_model.model": (None, None, None, None, 1, 2, 0),
    "seqio-test/sentencepiece.model": (0, None, None, None, None, 1, 2),
}
ODD = ["", "  ", "a  b ", " a", '(a) b-c "d" £5 – x.', "\ta", "ﬁne ½ Ａ", "cafe\u0301", "x\u200by"]


def lines(test_data, name, count):
    with (test_data / name).open(encoding="utf-8") as file:
        return [line.rstrip("\n") for _, line in zip(range(count), file, strict=False)]


@pytest.fixture(scope="module")
def spoken(test_data):
    """Text in four languages, and what normalisers trip over."""
    return {
        "en": lines(test_data, "en_wikipedia_2018/valid.txt", 100),
        "es": lines(test_data, "es_novels_eltec/valid.txt", 100),
        "zh": lines(test_data, "zh_wikipedia_2023_simplified/valid.txt", 100),
        "ja": lines(test_data, "sentencepiece_books/wagahaiwa_nekodearu.txt", 100),
        "odd": ODD,
    }


@pytest.mark.parametrize("name", list(MODELS))
def test_cuts_text_as_sentencepiece_does(test_data, spoken, name):
    import sentencepiece

    path = test_data / "vocab" / name
    ours = tokenizers.load(path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert ours.vocabulary.size == len(theirs)
    for language, texts in spoken.items():
        ids, lengths = ours.encode_sentences(texts)
        expected = theirs.encode(texts)
        cut = [part.tolist() for part in _split(ids, lengths)]
        # Equally probable cuts: the sums differ in the last bit, where float32 meets float64.
        differ = [a for a, b in zip(cut, expected, strict=True) if a != b]
        assert len(differ) <= 0.02 * len(texts), language


@pytest.mark.parametrize("name", list(MODELS))
def test_special_ids_are_those_of_the_file(test_data, name):
    vocabulary = tokenizers.load(test_data / "vocab" / name).vocabulary
    assert tuple(getattr(vocabulary, role) for role in vocabulary.TOKENS) == MODELS[name]
    assert all(i in vocabulary.special_ids for i in MODELS[name] if i is not None)


def test_ids_that_the_trainer_was_told_name_what_spelling_does_not(test_data):
    model = read_model(test_data / "vocab" / "cluecorpussmall" / "spm.model")
    roles = roles_of(model)
    assert roles["bos"] == roles["cls"] == "[CLS]" and roles["eos"] == roles["sep"] == "[SEP]"
    assert (roles["pad"], roles["unk"], roles["mask"]) == ("[PAD]", "[UNK]", "[MASK]")


@pytest.mark.hf
@pytest.mark.parametrize(
    "name, class_name, model_type",
    [
        ("t5-base/spiece.model", "T5Tokenizer", "t5"),
        ("albert-modified/30k-clean.model", "AlbertTokenizer", "albert"),
        ("xlnet/spiece.model", "XLNetTokenizer", "xlnet"),
    ],
)
def test_a_saved_one_loads_in_transformers_beside_a_model(
    test_data, spoken, tmp_path, name, class_name, model_type
):
    import transformers

    albert = True if model_type == "albert" else None
    loaded = tokenizers.load(
        test_data / "vocab" / name, lowercase=albert, sentinels=100 * (model_type == "t5")
    )
    loaded.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for texts in spoken.values():
        ids, lengths = loaded.encode_sentences(texts)
        expected = theirs(texts, add_special_tokens=False)["input_ids"]
        assert [part.tolist() for part in _split(ids, lengths)] == expected
    again = tokenizers.load(tmp_path)
    assert again.fingerprint == loaded.fingerprint and again.vocabulary == loaded.vocabulary


def test_sentinels_are_added_behind_as_t5_has_them(test_data):
    path = test_data / "vocab" / "t5-base" / "spiece.model"
    tokenizer = tokenizers.load(path, sentinels=100)
    vocabulary = tokenizer.vocabulary
    assert vocabulary.size == 32100 and vocabulary.sentinels[:2] == (32099, 32098)
    assert tokenizer.backend.encode("<extra_id_0> x").ids[0] == 32099
    assert tokenizer.backend.encode("a b").ids[-1] == 1
    assert not set(tokenizer.encode_sentences(["<extra_id_0>"])[0]) & set(vocabulary.sentinels)


def test_a_folder_with_nothing_but_a_model_file_is_enough(test_data, tmp_path):
    source = test_data / "vocab" / "sentencepiece-test" / "test_model.model"
    (tmp_path / "m.model").write_bytes(source.read_bytes())
    assert tokenizers.load(tmp_path).fingerprint == tokenizers.load(source).fingerprint
    (tmp_path / "n.model").write_bytes(source.read_bytes())
    with pytest.raises(UserError, match="several tokenizers: name one of m.model, n.model"):
        tokenizers.load(tmp_path)


def test_files_that_are_no_models_are_named(test_data, tmp_path):
    bad = tmp_path / "bad.model"
    whole = (test_data / "vocab" / "seqio-test" / "sentencepiece.model").read_bytes()
    for content in (b"text, not pieces", b"", whole[: len(whole) // 2]):
        bad.write_bytes(content)
        with pytest.raises(UserError, match="bad.model is no SentencePiece model"):
            read_model(bad)
    with pytest.raises(UserError, match="no tokenizer .*none.model: no such file"):
        tokenizers.load(tmp_path / "none.model")


@pytest.mark.parametrize(
    "special, roles",
    [
        (("<pad>", "</s>", "<unk>"), {"pad": 0, "eos": 1, "unk": 2}),
        (BERT_LIKE, {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}),
        (ROBERTA_LIKE, {"cls": 0, "bos": 0, "pad": 1, "sep": 2, "eos": 2, "unk": 3, "mask": 4}),
    ],
)
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_special_tokens_get_their_ids_in_order(special, roles, kind):
    trained = train_sentencepiece(TEXTS, 110, kind=kind, special_tokens=special, sentinels=3)
    vocabulary = trained.tokenizer.vocabulary
    assert {r: i for r in vocabulary.TOKENS if (i := getattr(vocabulary, r)) is not None} == roles
    size = vocabulary.size
    assert vocabulary.sentinels == (size - 1, size - 2, size - 3)


def test_training_gives_the_same_file_and_sentencepiece_reads_it():
    import sentencepiece

    first, second = (train_sentencepiece(iter(TEXTS), 100) for _ in range(2))
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint
    alone = sentencepiece.SentencePieceProcessor(model_proto=first.model)
    for text in TEXTS[:4]:
        assert first.tokenizer.encode_sentences([text])[0].tolist() == alone.encode(text)


@pytest.mark.parametrize(
    "normalization, expected",
    [
        (Normalization("nfkc"), "IŞIK ve ISI: İstanbul, ılık. fine spaces"),
        (
            Normalization("nfkc", lowercase=True, turkish_i=True),
            "ışık ve ısı: istanbul, ılık. fine",
        ),
        (Normalization("nfc", lowercase=True, strip_accents=True), "isik ve isi: istanbul"),
    ],
)
def test_one_normaliser_from_training_to_transformers(tmp_path, normalization, expected):
    from transformers import AutoTokenizer

    tokenizer = train_sentencepiece(TEXTS, 110, normalization=normalization).tokenizer
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode_sentences([TEXTS[3]])[0].tolist()
    assert theirs(TEXTS[3], add_special_tokens=False)["input_ids"] == ids
    assert tokenizer.backend.decode(ids).replace("  ", " ").startswith(expected)


def test_what_cannot_be_trained_is_said():
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece([], 100)
    with pytest.raises(UserError, match="needs <unk>"):
        train_sentencepiece(TEXTS, 100, special_tokens=("<pad>",))
    with pytest.raises(UserError, match="SentencePiece cannot train this vocabulary"):
        train_sentencepiece(TEXTS, 20)
    with pytest.raises(UserError, match="--character-coverage is above 0"):
        train_sentencepiece(TEXTS, 100, character_coverage=2.0)


def _split(ids, lengths):
    return np.split(ids, np.cumsum(lengths)[:-1])
