"""A mixture trains, is resumed with other weights, and is evaluated a part at a time."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers as library

from flaxpretrain.analysis.plan import print_plan
from flaxpretrain.config import Logging, Phase, load
from flaxpretrain.conversion.sources import dataset_facts
from flaxpretrain.data.backends import add_sentinels
from flaxpretrain.data.building import BuildSettings, build
from flaxpretrain.data.mixing import MixedData, Part
from flaxpretrain.data.records import Columns
from flaxpretrain.data.rows import Blocks, Documents
from flaxpretrain.data.sources import text_files
from flaxpretrain.data.tokenizers import Tokenizer
from flaxpretrain.errors import UserError
from flaxpretrain.training.checkpoints import Checkpoints
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.loop import train
from flaxpretrain.training.metrics import read_metrics
from flaxpretrain.training.schedules import Constant
from flaxpretrain.training.session import open_pipeline, open_run_dataset
from tests import toys
from tests.training.resuming import as_it_was


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    toys.dataset(folder / "wiki", documents=120)
    toys.dataset(folder / "books", documents=8, seed=1)
    return folder


def mixed_run(data, weights=(3.0, 1.0), steps=8):
    parts = tuple(
        Part(name=name, folder=name, weight=weight, layout=layout)
        for name, weight, layout in zip(("wiki", "books"), weights, (None, Blocks()), strict=True)
    )
    run = toys.packed_run("", steps=steps, schedule=Constant())
    mixture = MixedData(layout=Documents(), folder=str(data), parts=parts)
    return dataclasses.replace(
        run, data=mixture, evaluations=(FixedNoise(batch_size=8, every_steps=4),)
    )


def rows(workdir, name):
    return {
        row["step"]: row[name]
        for row in read_metrics(workdir / "metrics.jsonl")
        if row.get(name) is not None
    }


def test_a_mixture_trains_counts_epochs_and_is_evaluated_by_part(data, tmp_path, capsys):
    run = mixed_run(data)
    assert train(run, tmp_path) == 0
    said = capsys.readouterr().err
    assert "wiki: 75.0% of the rows" in said and "books: 25.0% of the rows" in said
    assert "epochs of" in said and "so its text is repeated" in said
    assert "all rows of books have been seen, its text is repeated" in said
    epochs = rows(tmp_path, "epochs/books")
    assert epochs[8] == pytest.approx(2 * epochs[4]) and epochs[8] > 1
    for figure in ("wiki/perplexity", "books/perplexity", "perplexity", "books/masked_lm"):
        assert set(rows(tmp_path, f"validation/{figure}")) == {4, 8}
    both = [rows(tmp_path, f"validation/{name}masked_lm")[8] for name in ("wiki/", "books/", "")]
    assert min(both[:2]) <= both[2] <= max(both[:2])


def test_resuming_with_the_same_weights_gives_the_same_losses(data, tmp_path):
    train(mixed_run(data), tmp_path / "whole", quiet=True)
    parts = as_it_was(tmp_path / "whole", tmp_path / "parts", step=4)
    train(mixed_run(data), parts, quiet=True)
    assert rows(parts, "loss") == rows(tmp_path / "whole", "loss")


def test_weights_may_change_when_a_run_is_resumed(data, tmp_path):
    train(mixed_run(data, steps=4), tmp_path, quiet=True)
    train(mixed_run(data, weights=(0.0, 1.0)), tmp_path, quiet=True)
    wiki, books = rows(tmp_path, "epochs/wiki"), rows(tmp_path, "epochs/books")
    assert wiki[8] == wiki[4] and books[8] - books[4] > 2 * books[4]
    metadata = Checkpoints(tmp_path / "checkpoints").metadata()
    assert [step for step, _ in metadata["mixing"]] == [0, 4]
    assert metadata["mixing"][1][1][0] == [0.0, 1.0]
    with pytest.raises(UserError, match="data.parts.1.name"):
        run = mixed_run(data)
        parts = (run.data.parts[0], dataclasses.replace(run.data.parts[1], name="other"))
        train(dataclasses.replace(run, data=dataclasses.replace(run.data, parts=parts)), tmp_path)


def test_what_was_trained_on_is_said_of_all_parts(data, tmp_path):
    run = mixed_run(data)
    facts = dataset_facts(run, tmp_path)
    assert sorted(facts["splits"]) == [
        "books/train", "books/validation", "wiki/train", "wiki/validation",
    ]  # fmt: skip
    gone = dataclasses.replace(run, data=dataclasses.replace(run.data, folder=str(tmp_path)))
    assert dataset_facts(gone, tmp_path) == {}


def test_the_plan_of_a_mixture_counts_the_mean_row(data, tmp_path, capsys):
    print_plan(mixed_run(data), tmp_path)
    assert "epochs of" in capsys.readouterr().out


def words_of(specials, words, sentinels):
    """A tokenizer of whole words, with T5's special tokens."""
    vocabulary = {token: number for number, token in enumerate([*specials, *words])}
    backend = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(specials)
    add_sentinels(backend, sentinels)
    return Tokenizer(backend, {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"})


def test_t5_learns_pairs_beside_denoising_in_one_batch(tmp_path):
    """The recipe of multi-task pretraining, shrunk, on two datasets that the builder makes."""
    root = Path(__file__).parent.parent.parent
    specials = ["<pad>", "</s>", "<unk>"]
    words = [f"w{n}" for n in range(60)]
    tokenizer = words_of(specials, words, sentinels=40)
    generator = np.random.default_rng(0)

    def line():
        start = generator.integers(0, 40)
        return " ".join(words[start : start + generator.integers(4, 20)])

    (tmp_path / "text.txt").write_text("\n\n".join(line() for _ in range(300)))
    pairs = [{"q": line(), "a": words[50 + n % 3]} for n in range(200)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    build([text_files(tmp_path / "text.txt")], tokenizer, tmp_path / "data" / "text")
    columns = Columns("q", "a", "w49 ")
    source = text_files(tmp_path / "pairs.jsonl", columns=columns)
    settings = BuildSettings(validation_share=0.1)
    build([source], tokenizer, tmp_path / "data" / "questions", settings)

    run = load(root / "configs" / "t5_multitask_tiny.py")
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, vocab_size=tokenizer.vocabulary.size),
        data=dataclasses.replace(run.data, folder=str(tmp_path / "data")),
        schedule=Constant(),
        phases=(Phase(steps=30, length=64, batch_size=8),),
        evaluations=(FixedNoise(batch_size=8),),
        logging=Logging(every_steps=1, tensorboard=False),
    )
    session = open_pipeline(run, open_run_dataset(run, tmp_path), run.phases)
    assert 0.05 < session.shares(0)["questions"] < 0.9
    batch = session.batch(0)
    answers = np.isin(
        batch["labels"], [tokenizer.backend.token_to_id(w) for w in words[50:53]]
    ).any(axis=1)
    prefixed = (batch["input_ids"][:, 0] == tokenizer.backend.token_to_id("w49")) & answers
    assert 0 < prefixed.sum() < 8
    assert train(run, tmp_path / "w", quiet=True) == 0
    losses = rows(tmp_path / "w", "loss")
    assert losses[30] < losses[1] - 1
    for part in ("text", "questions"):
        assert rows(tmp_path / "w", f"validation/{part}/perplexity")[30] < 60
