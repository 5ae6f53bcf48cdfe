"""Where words begin: as each family's own splitting has it, and as jieba finds Chinese words."""

import itertools

import numpy as np
import pytest
import tokenizers as library

from flaxpretrain.data import tokenizers
from flaxpretrain.data.building import BuildSettings, build
from flaxpretrain.data.normalization import Normalization
from flaxpretrain.data.sources import TextFiles
from flaxpretrain.data.tokenizer_training import train_bpe, train_unigram, train_wordpiece
from flaxpretrain.data.word_starts import Segmenter, segmenter, unspaced
from flaxpretrain.errors import UserError

TEXTS = [
    "A well-known player was (perhaps) playing. Then, in 1984, he said: don't!",
    "La canción «última» del año 2001 terminó así...",
    "九龙巴士214线是香港九龙市区的一条日间巴士路线。",
] * 3


def trained(train, **options):
    return train(itertools.chain(TEXTS, ["playing known perhaps 1984 canción"]), 420, **options)


MAKE = {
    "wordpiece": lambda: trained(train_wordpiece, normalization=Normalization()),
    "bpe": lambda: trained(train_bpe),
    "unigram": lambda: train_unigram(iter(TEXTS), 120),
}


@pytest.fixture(params=MAKE, scope="module")
def tokenizer(request):
    return MAKE[request.param]()


def cut(tokenizer, text):
    """The text cut where words begin."""
    ids, _ = tokenizer.encode_sentences([text])
    opens = tokenizer.word_rule(ids)
    opens[0] = True
    begins = tokenizer.token_offsets([text])[opens].tolist()
    return [text[a:b].strip() for a, b in itertools.pairwise([0, *begins[1:], len(text)])]


def test_words_are_cut_at_spaces_and_where_the_kind_of_character_changes(tokenizer):
    assert cut(tokenizer, "A well-known player (perhaps) playing.") == [
        "A", "well", "-", "known", "player", "(", "perhaps", ")", "playing", ".",
    ]  # fmt: skip
    assert cut(tokenizer, "La canción del año 2001") == ["La", "canción", "del", "año", "2001"]


def test_each_chinese_character_is_a_word_as_far_as_the_tokenizer_keeps_it_apart():
    for family in ("wordpiece", "bpe"):
        tokenizer = MAKE[family]()
        assert "".join(cut(tokenizer, "九龙巴士")) == "九龙巴士"
        if family == "wordpiece":
            assert cut(tokenizer, "九龙巴士") == list("九龙巴士")


def agreement(tokenizer, texts):
    """Share of tokens at which the rule and the tokenizer's own splitting agree."""
    same = total = 0
    for text in texts:
        encoding = tokenizer.backend.encode(text, add_special_tokens=False)
        theirs = np.diff([-1, *encoding.word_ids]) != 0
        ours = tokenizer.word_rule(np.array(encoding.ids))
        ours[:1] = True
        same += int((ours == theirs).sum())
        total += len(theirs)
    return same / total


@pytest.mark.parametrize(
    ("vocabulary", "corpus", "least"),
    [
        ("bert-base-uncased/vocab.txt", "en_wikipedia_2018", 1.0),
        ("roberta-base", "en_wikipedia_2018", 0.999),
        ("beto/vocab.txt", "es_novels_eltec", 1.0),
        ("roberta-base", "es_novels_eltec", 0.98),
        ("bert-base-chinese/vocab.txt", "zh_wikipedia_2023_simplified", 1.0),
    ],
)
def test_the_rule_agrees_with_the_tokenizers_own_splitting(test_data, vocabulary, corpus, least):
    """In byte-level BPE a piece of a split accented character has no kind: a few differ."""
    tokenizer = tokenizers.load(test_data / "vocab" / vocabulary)
    lines = (test_data / corpus / "valid.txt").read_text(encoding="utf-8").split("\n")
    assert agreement(tokenizer, [line[:1000] for line in lines[:100] if line]) >= least


def test_real_sentencepiece_words_are_those_between_spaces_and_marks(test_data):
    lines = (test_data / "en_wikipedia_2018/valid.txt").read_text(encoding="utf-8").split("\n")
    tokenizer = train_unigram(lines[:2000], 2000)
    pieces = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Metaspace(),
            library.pre_tokenizers.Split(library.Regex(r"▁?(\p{L}\p{M}*)+|▁?\p{N}+"), "isolated"),
        ]
    )
    ours = theirs = 0
    for line in lines[:100]:
        text = tokenizer.backend.normalizer.normalize_str(line)
        ids, _ = tokenizer.encode_sentences([line])
        ours += int(tokenizer.word_rule(ids).sum())
        theirs += len(pieces.pre_tokenize_str(text))
    # A piece such as "-water" is a word and its mark at once.
    assert 0.97 * theirs < ours <= theirs


class Words(Segmenter):
    """Words that are told."""

    def __init__(self, *words):
        self.words = words

    def starts(self, text):
        starts = np.zeros(len(text), bool)
        starts[np.cumsum([0, *map(len, self.words)])[:-1]] = True
        return starts


def test_a_segmenter_joins_chinese_tokens_and_leaves_others():
    text, words = "用BERT研究自然语言处理。", ("用", "BERT", "研究", "自然语言", "处理", "。")
    offsets = np.array([0, 1, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13])
    opens = np.array([1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], bool)
    marked = Words(*words).mark(
        [text, "", "not Chinese"],
        np.append(offsets, [0, 4]),
        np.array([12, 0, 2]),
        np.append(opens, [True, True]),
    )
    #                        用 BE ##RT 研 究 自 然 语 言 处 理 。
    assert marked.tolist() == [1, 1, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 1, 1]


def test_scripts_without_spaces():
    assert all(map(unspaced, "中あアก"))
    assert not any(map(unspaced, "aéяα1.。，한"))


def test_jieba_words_are_recorded_with_the_dataset(tmp_path):
    pytest.importorskip("jieba")
    path = tmp_path / "text.txt"
    path.write_text("研究自然语言处理。\n我爱北京天安门\n", encoding="utf-8")
    (tmp_path / "vocab.txt").write_text(
        "\n".join(
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"研究自然语言处理。我爱北京天安门"]
        )
    )
    tokenizer = tokenizers.load(tmp_path / "vocab.txt")
    found = {}
    for words in (None, "jieba"):
        settings = BuildSettings(validation_share=0.0, words=words)
        source = TextFiles("text", (path,))
        dataset = build([source], tokenizer, tmp_path / str(words), settings)
        split = dataset.split("train")
        _, found[words] = split.gather(np.array([0]), np.array([split.tokens]), split.tokens)
        assert dataset.metadata["build"]["words"] == words
    assert found[None].all()
    #                                     研 究 自 然 语 言 处 理 。 我 爱 北 京 天 安 门
    assert found["jieba"][0].tolist() == [1, 0, 1, 0, 0, 0, 1, 0, 1, 1, 1, 1, 0, 1, 0, 0]


def test_unknown_segmenters_are_named(tmp_path):
    with pytest.raises(UserError, match="words is jieba, or None; got 'ltp'"):
        BuildSettings(words="ltp")
    with pytest.raises(UserError, match="words are found by jieba; got 'ltp'"):
        segmenter("ltp")
