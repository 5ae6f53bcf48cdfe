"""tools/train_tokenizer.py: every family, extension, and how well a tokenizer fits."""

import pytest

from flaxpretrain.data import tokenizers
from flaxpretrain.errors import UserError

TEXT = "\n".join(["The river runs through the old town.", "A café by the river, 中国 too."] * 6)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text" / "a.txt"
    path.parent.mkdir()
    path.write_text(TEXT, encoding="utf-8")
    return path.parent


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "wordpiece", "--vocab-size", "90"],
        ["--model", "characters", "--vocab-size", "70"],
        ["--model", "bpe", "--vocab-size", "300", "--unicode", "nfc", "--lowercase"],
        ["--model", "unigram", "--vocab-size", "60", "--sentinels", "2"],
        ["--model", "unigram", "--trainer", "tokenizers", "--vocab-size", "60"],
        ["--model", "sentencepiece-bpe", "--vocab-size", "60"],
    ],
)
def test_families(tool, corpus, tmp_path, capsys, flags):
    output = tmp_path / "tokenizer"
    tool("train_tokenizer").main(["--corpus-dir", str(corpus), *flags, "--output-dir", str(output)])
    printed = capsys.readouterr().out
    assert "tokens/word" in printed and "unknown" in printed and "text " in printed
    loaded = tokenizers.load(output)
    assert f"{loaded.vocabulary.size:,} ids of" in printed
    assert (output / "spiece.model").exists() == (
        "tokenizers" not in flags and ("unigram" in flags or "sentencepiece-bpe" in flags)
    )


def test_extension_and_report_of_languages(tool, corpus, tmp_path, capsys):
    train = tool("train_tokenizer").main
    base, larger = tmp_path / "base", tmp_path / "larger"
    train(["--corpus-dir", str(corpus), "--vocab-size", "90", "--output-dir", str(base)])
    films = tmp_path / "films.txt"
    films.write_text("filmed films — filmed\n" * 5, encoding="utf-8")
    arguments = ["--extend", str(base), "--corpus-dir", str(films), "--output-dir", str(larger)]
    train([*arguments, "--vocab-size", "100", "--report", f"river={corpus}"])
    printed = capsys.readouterr().out
    assert "ids stay" in printed and "—" in printed
    assert any(line.startswith("river ") for line in printed.splitlines())
    before, after = (tokenizers.load(folder).backend.get_vocab() for folder in (base, larger))
    assert before.items() < after.items()


def test_what_is_broken_stops_the_training_or_is_left_out_and_counted(
    tool, corpus, tmp_path, capsys
):
    lines = ['{"text": "The river runs."}', '{"text": "cut', '{"text": ""}']
    (corpus / "b.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["--corpus-dir", str(corpus), "--vocab-size", "90", "--output-dir"]
    with pytest.raises(UserError, match="b.jsonl, line 2: no JSON"):
        tool("train_tokenizer").main([*arguments, str(tmp_path / "t")])
    assert not (tmp_path / "t").exists()
    tool("train_tokenizer").main([*arguments, str(tmp_path / "t"), "--skip-broken"])
    said = capsys.readouterr()
    assert "text: 1 left out as broken; 1 records without text" in said.out
    # Told in the first of all passes over the text.
    assert said.err.count("left out: ") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--report", "nothing"], "--report takes NAME=PATH"),
        (["--turkish-i", "--no-lowercase"], "Turkish i is about lower case"),
        (["--sentinels", "3"], "--sentinels goes with --model unigram, not wordpiece"),
        (["--extend", "none.txt"], "no tokenizer none.txt"),
        (["--extend", "none.txt", "--unicode", "nfc"], "--unicode is for training"),
    ],
)
def test_mistakes(tool, corpus, tmp_path, flags, message):
    arguments = ["--corpus-dir", str(corpus), "--vocab-size", "90"]
    with pytest.raises(UserError, match=message):
        tool("train_tokenizer").main([*arguments, "--output-dir", str(tmp_path / "t"), *flags])
