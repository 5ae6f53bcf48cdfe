"""The steps of docs/domain_adaptation.md on two tiny worlds, from text to the hub."""

import json

import numpy as np
import pytest

from flaxpretrain import main
from flaxpretrain.data import tokenizers
from flaxpretrain.errors import UserError
from flaxpretrain.training.metrics import read_metrics
from tests.conversion.conftest import fake_hub as fake_hub
from tests.tools.conftest import TOOLS

pytestmark = pytest.mark.slow

RECIPE = TOOLS.parent / "configs" / "domain_adaptation.py"
PLACES, FILMS = ("town", "river", "road", "castle"), ("film", "movie", "story", "cast")
PRAISE, BLAME = ("great", "funny", "warm"), ("long", "dull", "sad")
PROMPTS = ("This is a great [MASK].", "The dull [MASK].", "This is a funny [MASK].")
SIZES = (
    *("model.n_heads=4", "model.dim=32", "model.hidden_dim=64", "model.n_layers=2"),
    *("model.dropout=0.0", "model.attention_dropout=0.0", "length=16", "batch_size=32"),
    *("optimizer.learning_rate=1e-2", "logging.every_steps=10", "logging.tensorboard=false"),
)


def sentences(nouns, adjectives, count, seed):
    """Such as "this is a great film ." and "the dull cast .": the nouns are the domain's."""
    draw = np.random.default_rng(seed)
    forms = ("this is a {a} {n} .", "the {a} {n} .", "a {a} {n} , and the {a} {m} too .")
    return [
        str(draw.choice(forms)).format(
            a=draw.choice(adjectives), n=draw.choice(nouns), m=draw.choice(nouns)
        )
        for _ in range(count)
    ]


def train(data, workdir, *options):
    """run_pretraining.py with the recipe of DistilBERT, shrunk."""
    sets = [part for value in SIZES for part in ("--set", value)]
    arguments = [RECIPE, "--data-dir", data, "--workdir", workdir, *sets, *options]
    assert main.main([str(a) for a in arguments]) == 0


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with `general.txt`, and `reviews/good.txt` and `bad.txt`, a text a line."""
    folder = tmp_path_factory.mktemp("adaptation")
    (folder / "reviews").mkdir()
    general = [*sentences(PLACES, (*PRAISE, *BLAME), 9000, 0), *sentences(FILMS, PRAISE, 4, 1)]
    (folder / "general.txt").write_text("\n".join(general) + "\n")
    for name, adjectives, seed in (("good", PRAISE, 2), ("bad", BLAME, 3)):
        lines = sentences(FILMS, adjectives, 4000, seed)
        (folder / "reviews" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_a_general_model_is_adapted_and_pushed(texts, tool, tmp_path, fake_hub, capsys):
    transformers = pytest.importorskip("transformers")
    tokenizer = tmp_path / "tokenizer"
    tool("train_tokenizer").main(
        [*("--corpus-dir", str(texts), "--model", "wordpiece", "--vocab-size", "120")]
        + ["--output-dir", str(tokenizer)]
    )
    size = ("--set", f"model.vocab_size={tokenizers.load(tokenizer).vocabulary.size}")
    for name in ("general.txt", "reviews"):
        tool("build_pretraining_dataset").main(
            [*("--corpus-dir", str(texts / name), "--tokenizer", str(tokenizer))]
            + [*("--output-dir", str(tmp_path / name), "--format", "lines")]
            + [*("--validation-share", "0.1", "--max-seq-length", "16", "--language", "en")]
        )
    general, adapted, reviews = tmp_path / "w0", tmp_path / "w1", tmp_path / "reviews"
    first = ("--set", "epochs=4", "--set", "finish=()", "--set", "evaluations=()")
    train(tmp_path / "general.txt", general, *size, *first)
    push = ("--set", "finish.0.push_to_hub=me/films")
    train(reviews, adapted, *size, "--set", "epochs=4", "--init-from", general, *push)

    # The same masks before the first step, after each epoch and at the end.
    rows = read_metrics(adapted / "metrics.jsonl")
    perplexity = {
        r["step"]: r["validation/perplexity"] for r in rows if "validation/perplexity" in r
    }
    steps = max(perplexity)
    assert len(perplexity) == 5 and set(perplexity) >= {0, steps}
    assert perplexity[steps] < 0.5 * perplexity[0]

    # What stands at the mask of the same sentences, before and after.
    before, after = guesses(tool, general, capsys), guesses(tool, adapted, capsys)
    assert not set(before) & set(FILMS) and set(after) <= set(FILMS)

    # The folder for Transformers, which was pushed, says the same there.
    assert guesses(tool, adapted / "hf", capsys) == after
    fill = transformers.pipeline("fill-mask", model=str(adapted / "hf"))
    assert [found[0]["token_str"] for found in fill(list(PROMPTS))] == after
    assert fake_hub.files["model.safetensors"] == (adapted / "hf/model.safetensors").read_bytes()
    config = json.loads(fake_hub.files["config.json"])
    assert config["model_type"] == "distilbert"
    assert config["architectures"] == ["DistilBertForMaskedLM"]

    # The chapter's last exercise: a classifier before and after, of frozen encoders.
    classes = [str(p) for n in ("bad", "good") for p in ("--class", texts / "reviews" / f"{n}.txt")]
    tool("probe").main([str(general), str(adapted), *classes, "--data-dir", str(reviews), "--json"])
    first, last = json.loads(capsys.readouterr().out)["models"]
    assert last["accuracy"] > 0.9 and last["accuracy"] >= first["accuracy"]


def guesses(tool, model, capsys):
    """The likeliest token at the mask of each sentence."""
    found = []
    for prompt in PROMPTS:
        capsys.readouterr()
        tool("fill_mask").main([str(model), prompt, "--json"])
        found.append(json.loads(capsys.readouterr().out)["masks"][0][0]["token"])
    return found


def test_a_dataset_of_another_tokenizer_is_refused(texts, tool, tmp_path):
    """Which would otherwise train on other words under the same numbers."""
    for name, corpus in (("a", "general.txt"), ("b", "reviews")):
        tool("train_tokenizer").main(
            [*("--corpus-dir", str(texts / corpus), "--model", "wordpiece", "--vocab-size", "60")]
            + ["--output-dir", str(tmp_path / name)]
        )
        tool("build_pretraining_dataset").main(
            [*("--corpus-dir", str(texts / "general.txt"), "--tokenizer", str(tmp_path / name))]
            + [*("--output-dir", str(tmp_path / f"data-{name}"), "--format", "lines")]
            + [*("--validation-share", "0.1", "--max-seq-length", "16")]
        )
    size = ("--set", "model.vocab_size=60", "--set", "finish=()", "--set", "evaluations=()")
    train(tmp_path / "data-a", tmp_path / "w", *size, "--set", "steps=1")
    with pytest.raises(UserError, match="tokens have another id or none"):
        train(tmp_path / "data-b", tmp_path / "v", *size, "--init-from", tmp_path / "w")
