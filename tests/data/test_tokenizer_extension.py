"""More tokens for a tokenizer: old ids stay, new ones shorten the domain's text."""

import pytest

from flaxpretrain.data import tokenizers
from flaxpretrain.data.tokenizer_extension import extend, merges
from flaxpretrain.data.tokenizer_training import (
    train_bpe,
    train_characters,
    train_sentencepiece,
    train_unigram,
    train_wordpiece,
)
from flaxpretrain.errors import UserError

GENERAL = ["the river runs through the old town and the bridge", "a town by the river"] * 4
DOMAIN = ["carcinoma of the gland — carcinomas; the gland’s lymphoma", "lymphoma, carcinoma"] * 3
BASES = {
    "wordpiece": lambda: train_wordpiece(GENERAL, 80),
    "bpe": lambda: train_bpe(GENERAL, 290),
    "unigram": lambda: train_unigram(GENERAL, 50, sentinels=3),
    "sentencepiece": lambda: train_sentencepiece(GENERAL, 60, sentinels=3).tokenizer,
    "sentencepiece bpe": lambda: train_sentencepiece(GENERAL, 60, kind="bpe").tokenizer,
}


@pytest.fixture(scope="module", params=list(BASES))
def base(request):
    return BASES[request.param]()


@pytest.fixture(scope="module")
def larger(base):
    return extend(base, DOMAIN, base.vocabulary.size + 40)


def test_all_tokens_keep_their_ids(base, larger):
    before, after = base.backend.get_vocab(), larger.tokenizer.backend.get_vocab()
    assert before.items() <= after.items()
    size = base.vocabulary.size
    assert [after[token] for token in larger.added] == list(range(size, size + len(larger.added)))
    assert larger.tokenizer.roles == base.roles
    assert larger.tokenizer.vocabulary.sentinels == base.vocabulary.sentinels
    assert larger.tokenizer.vocabulary.special_ids == base.vocabulary.special_ids


def test_domain_words_become_single_tokens(base, larger):
    for word in ("carcinoma", "lymphoma"):
        ids = larger.tokenizer.encode_sentences([f"the {word}"])[0]
        cut = [larger.tokenizer.backend.id_to_token(int(i)) for i in ids]
        assert cut[-1].strip("▁Ġ") == word, cut
    short, long = (t.encode_sentences(DOMAIN)[0] for t in (larger.tokenizer, base))
    assert len(short) < 0.7 * len(long) or "[UNK]" in base.roles.values()


def test_missing_characters_are_learned(base, larger):
    unk = larger.tokenizer.vocabulary.unk
    assert unk not in larger.tokenizer.encode_sentences(DOMAIN)[0].tolist()


def test_the_same_texts_give_the_same_tokenizer(base, larger):
    again = extend(base, iter(DOMAIN), base.vocabulary.size + 40)
    assert again.tokenizer.fingerprint == larger.tokenizer.fingerprint


def test_transformers_loads_it_and_encodes_equally(larger, tmp_path):
    from transformers import AutoTokenizer

    larger.tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == larger.tokenizer.vocabulary.size
    for text in DOMAIN[:2] + GENERAL[:1]:
        expected = larger.tokenizer.encode_sentences([text])[0].tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == expected
    assert tokenizers.load(tmp_path).fingerprint == larger.tokenizer.fingerprint


def test_merges_go_by_frequency_then_by_text():
    words = ["abab", "abc", "bc"]
    found = list(merges([list(word) for word in words], [2, 3, 4], lambda a, b: a + b))
    assert [(merge.merged, merge.count) for merge in found] == [
        ("ab", 7),
        ("bc", 4),
        ("abc", 3),
        ("abab", 2),
    ]


def test_rare_tokens_are_not_added_and_the_size_holds():
    base = BASES["bpe"]()
    few = extend(base, DOMAIN, 400, min_frequency=6)
    assert 290 < few.tokenizer.vocabulary.size < 400
    assert extend(base, DOMAIN, 293).tokenizer.vocabulary.size == 293
    with pytest.raises(UserError, match="has 290 tokens already.*--vocab-size 290"):
        extend(base, DOMAIN, 290)
    with pytest.raises(UserError, match="no text to extend"):
        extend(base, [], 300)


def test_a_dash_that_beto_lacks_becomes_known(test_data):
    beto = tokenizers.load(test_data / "vocab" / "beto" / "vocab.txt", lowercase=False)
    with (test_data / "es_novels_eltec" / "valid.txt").open(encoding="utf-8") as file:
        lines = [line.rstrip("\n") for _, line in zip(range(3000), file, strict=False)]
    unknown = (beto.encode_sentences(lines)[0] == beto.vocabulary.unk).mean()
    assert 0.005 < unknown < 0.03
    larger = extend(beto, lines, beto.vocabulary.size + 12)
    assert {"—", ";", "«", "»"} <= set(larger.added)
    ids = larger.tokenizer.encode_sentences(lines)[0]
    assert (ids == beto.vocabulary.unk).mean() < 0.001
    assert larger.tokenizer.vocabulary.mask == 0


def test_chinese_characters_get_no_useless_pieces():
    texts = ["中国的 river 河流很长", "国家 town 很大"] * 3
    tokenizer = train_characters(texts, 60)
    tokens = tokenizer.backend.get_vocab()
    assert {"中", "国", "河", "river", "town"} <= set(tokens)
    assert not {"##中", "##国"} & set(tokens) and "##i" in tokens
    assert tokenizer.encode_sentences(["中国河流"])[0].tolist() == [tokens[c] for c in "中国河流"]
    few = train_characters([*texts, "很国很国"], 8).backend.get_vocab()
    assert len(few) <= 8 and {"国", "很"} < set(few)
