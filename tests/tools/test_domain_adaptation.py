"""The steps of docs/domain_adaptation.md on two tiny worlds, from text to the hub."""

import numpy as np
import pytest

from flaxpretrain import main
from flaxpretrain.data import tokenizers
from flaxpretrain.training.metrics import read_metrics
from tests.conversion.conftest import fake_hub as fake_hub
from tests.tools.conftest import TOOLS

pytestmark = pytest.mark.slow

RECIPE = TOOLS.parent / "configs" / "domain_adaptation.py"
PLACES, FILMS = ("town", "river", "road", "castle"), ("film", "movie", "story", "cast")
PRAISE, BLAME = ("great", "funny", "warm"), ("long", "dull", "sad")
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
def texts(tmp_path_factory, request):
    """A folder with `general.txt`, and `reviews/good.txt` and `bad.txt`, a text a line."""
    if "slow" not in request.config.option.markexpr:
        pytest.skip("trains twice, for a minute on a core: run with -m slow")
    folder = tmp_path_factory.mktemp("adaptation")
    (folder / "reviews").mkdir()
    general = [*sentences(PLACES, (*PRAISE, *BLAME), 900, 0), *sentences(FILMS, PRAISE, 4, 1)]
    (folder / "general.txt").write_text("\n".join(general) + "\n")
    for name, adjectives, seed in (("good", PRAISE, 2), ("bad", BLAME, 3)):
        lines = sentences(FILMS, adjectives, 400, seed)
        (folder / "reviews" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_a_general_model_is_adapted_and_handed_to_a_hub(texts, tool, tmp_path, fake_hub, capsys):
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
    capsys.readouterr()
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
