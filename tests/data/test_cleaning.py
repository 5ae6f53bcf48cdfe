"""Cleaning steps, each by what it does to a sentence or document."""

import pytest

from flaxpretrain.data.cleaning import (
    LANGUAGE_SCRIPTS,
    KeepScripts,
    Lengths,
    NormalizeUnicode,
    RemoveControls,
    RemoveMarkup,
    Scrub,
    Symbols,
)
from flaxpretrain.errors import UserError


def test_unicode_has_one_spelling():
    assert NormalizeUnicode().clean("cafe\u0301 ﬁne") == "café ﬁne"
    assert NormalizeUnicode("NFKC").clean("cafe\u0301 ﬁne ½") == "café fine 1⁄2"
    with pytest.raises(UserError, match="NFC or NFKC; got 'NFD'"):
        NormalizeUnicode("NFD")


@pytest.mark.parametrize(
    "before, after",
    [
        ("a\x00b\u200bc\ufeff", "abc"),
        ("soft\u00adhyphen", "softhyphen"),
        ("a\u00a0\t b\u3000c ", "a b c"),
        ("\u202bright\u202c", "right"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        ("\x07", ""),
    ],
)
def test_controls_go_and_joiners_stay(before, after):
    assert RemoveControls().clean(before) == after


@pytest.mark.parametrize(
    "before, after",
    [
        ("Baghdad (; ) is the capital.", "Baghdad is the capital."),
        ("Brazil ( ), officially", "Brazil, officially"),
        ("The Canal (, ), and (nested ()) it", "The Canal, and (nested) it"),
        ("Azincourt (; historically, Agincourt) is", "Azincourt (historically, Agincourt) is"),
        ("北京（）是首都，上海（，）也", "北京是首都，上海也"),
        ("call print() or f( x ) (really)", "call print() or f( x ) (really)"),
        ("AT&amp;T &lt;b&gt;bold&lt;/b&gt;", "AT&T bold"),
        ("a<br/>b <i>c</i> <ref name=x>note</ref>.", "a b c."),
        ("x <ref name='y'/> [12] [citation needed]", "x"),
        ("if a < b and c > d", "if a < b and c > d"),
        ("vectors <x, y> of [[space|spaces]] and [[time]]", "vectors <x, y> of spaces and time"),
        ("{{cite|a}}'''Bold''' and ''italic''", "Bold and italic"),
        ("see [http://a.org the site]", "see the site"),
        ("plain text , kept", "plain text , kept"),
        ("<!-- hidden -->", ""),
    ],
)
def test_markup_goes_and_text_stays(before, after):
    assert RemoveMarkup().clean(before) == after
    assert RemoveMarkup().clean(after) == after


def test_empty_sentences_and_documents_go():
    assert RemoveMarkup()(("{{box}}", "text")) == ("text",)
    assert RemoveControls()(("\x00", "\u200b")) is None


def test_empty_brackets_of_real_text_go(test_data):
    import re

    lines = (test_data / "en_wikipedia_2018" / "train.txt").read_text("utf-8").splitlines()
    flawed = [line for line in lines if re.search(r" \([ ,;]*\)", line)]
    assert len(flawed) > 300
    cleaned = [RemoveMarkup().clean(line) for line in flawed]
    assert not any(re.search(r" \([ ,;]*\)", line) for line in cleaned)
    # Nothing else went: all words are there.
    words = [re.findall(r"\w+", line) for line in (" ".join(flawed), " ".join(cleaned))]
    assert len(words[1]) > 0.999 * len(words[0])


def test_languages_are_told_by_script():
    english, chinese = ("The river runs.", "中"), ("北京是首都。", "in 1949")
    keep = {name: KeepScripts(LANGUAGE_SCRIPTS[name]) for name in ("en", "zh", "ja", "ru")}
    assert keep["en"](english) == english and keep["en"](chinese) is None
    assert keep["zh"](chinese) == chinese and keep["zh"](english) is None
    assert keep["ja"](("吾輩は猫である",)) and keep["ru"](("Ｍосква́ — город",))
    assert keep["en"](("1234 5678 ...",)) is None
    with pytest.raises(UserError, match="takes one or more"):
        KeepScripts((), 0.5)


def test_chinese_text_is_kept_as_it_is(test_data):
    lines = (test_data / "zh_wikipedia_2023_simplified" / "valid.txt").read_text("utf-8")
    sentences = tuple(line for line in lines.splitlines()[:800] if line)
    assert KeepScripts(("CJK",))(sentences) == sentences
    cleaned = RemoveMarkup()(sentences)
    changed = sum(a != b for a, b in zip(sentences, cleaned, strict=True))
    assert changed < 0.05 * len(sentences)


def test_lengths():
    step = Lengths(document=(6, 12), sentence=(2, 5))
    assert step(("a", "bcd", "efgh", "ijklmn")) == ("bcd", "efgh")
    assert step(("abc",)) is None
    assert step(("abcd", "efgh", "ijklm")) is None
    with pytest.raises(UserError, match="from a least to a most; got 5 to 3"):
        Lengths(document=(5, 3))


def test_symbols_and_digits():
    assert Symbols(0.3).clean("a price of 5 £, paid") == "a price of 5 £, paid"
    assert Symbols(0.3).clean("--- *** ---") == ""
    assert Symbols(0.3, 0.5).clean("12 34 56 a") == ""
    assert Symbols(0.3)(("###",)) is None
    assert Symbols(0.3).clean("नमस्ते दुनिया") != ""


@pytest.mark.parametrize(
    "before, after",
    [
        ("mail ann.lee+x@mail.example.org, please", "mail (e-mail address), please"),
        ("call +49 30 1234567 or (212) 555-0100", "call (phone number) or (phone number)"),
        ("call 212-555-0100 now", "call (phone number) now"),
        (
            "from 1914 to 1918, 12,345,678 of 3.14159265",
            "from 1914 to 1918, 12,345,678 of 3.14159265",
        ),
        ("ISBN 978-3-16-148410-0 on 2018-11-20", "ISBN 978-3-16-148410-0 on 2018-11-20"),
        ("key AKIAABCDEFGHIJKLMNOP here", "key (secret) here"),
        ('api_key = "s3cr3t-value"', 'api_key = "(secret)"'),
        ("password: hunter22", "password: (secret)"),
        ("the password is short", "the password is short"),
        ("token ghp_" + "a1B2" * 9, "token (secret)"),
    ],
)
def test_addresses_numbers_and_secrets(before, after):
    assert Scrub().clean(before) == after
