"""A small general model adapted to film reviews, beside one that stayed with Wikipedia.

    FLAXPRETRAIN_TEST_DATA=CORPORA python benchmarks/domain_adaptation.py

Trains configs/general_small.py on en_wikipedia_2018, then from its weights, for equally many
steps, configs/domain_adaptation_small.py on the reviews of sentence_polarity and, as a control, on
Wikipedia again. All three are then evaluated on reviews held out, under the same masks; they fill
the same masks; and a logistic probe tells good reviews from bad by their frozen hidden states. Half
an hour on two cores with nothing else to do; interrupted, it goes on. Writes
benchmarks/results/domain_adaptation.json.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flaxpretrain import program
from flaxpretrain.errors import UserError
from flaxpretrain.training.metrics import read_metrics

RESULT = ROOT / "benchmarks" / "results" / "domain_adaptation.json"
SENTENCES = (
    "This is a great [MASK].",
    "The [MASK] is too long.",
    "It was born in [MASK].",
    "A funny and touching [MASK] about love.",
)
CLASSES = {"negative": "rt-polarity.neg.txt", "positive": "rt-polarity.pos.txt"}
TARGET_REDUCTION = 0.25
"""Of the perplexity on reviews, against the control."""


def parser() -> program.Parser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/domain_adaptation"), help="all output goes here"
    )
    return parser


def corpora() -> Path:
    """The folder of real corpora."""
    folder = os.environ.get("FLAXPRETRAIN_TEST_DATA")
    if not folder or not (Path(folder) / "sentence_polarity").is_dir():
        raise UserError(
            "FLAXPRETRAIN_TEST_DATA: expected a folder with en_wikipedia_2018 and sentence_polarity"
        )
    return Path(folder)


def call(*arguments: object, **options) -> str:
    """Runs one of the programs; its output goes where ours goes, or is returned if it is JSON."""
    command = [sys.executable, *map(str, arguments)]
    print("$ python " + " ".join(command[1:]), file=sys.stderr, flush=True)
    wanted = "--json" in command
    done = subprocess.run(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE if wanted else None, **options
    )
    if done.returncode:
        raise UserError(f"{arguments[0]} ended with exit code {done.returncode}")
    return done.stdout or ""


def prepare(work: Path, source: Path) -> None:
    """Text, tokenizer and the two datasets, as far as they are not there."""
    texts = work / "reviews_text"
    texts.mkdir(parents=True, exist_ok=True)
    for name, file in CLASSES.items():
        # Some lines are there twice; a copy in the training split would not be held out.
        lines = (source / "sentence_polarity" / file).read_text(encoding="utf-8").split("\n")
        kept = dict.fromkeys(line.strip() for line in lines if line.strip())
        (texts / f"{name}.txt").write_text("\n".join(kept) + "\n", encoding="utf-8")
    wikipedia = source / "en_wikipedia_2018" / "train.txt"
    if not (work / "tokenizer").exists():
        call("tools/train_tokenizer.py", "--corpus-dir", wikipedia, "--model", "wordpiece",
             "--vocab-size", 4096, "--output-dir", work / "tokenizer")  # fmt: skip
    for name, text, *options in (
        ("wiki", wikipedia, "--licence", "cc-by-sa-3.0", "--attribution", "Wikipedia contributors"),
        ("reviews", texts, "--format", "lines", "--validation-share", 0.1),
    ):
        if not (work / name / "dataset.json").exists():
            call("tools/build_pretraining_dataset.py", "--corpus-dir", text, "--tokenizer",
                 work / "tokenizer", "--output-dir", work / name, "--language", "en",
                 "--max-seq-length", 64, *options)  # fmt: skip


def trained(recipe: str, data: Path, workdir: Path, *options: object) -> dict:
    """Trains, or goes on; gives steps, seconds and perplexities."""
    if not (workdir / "checkpoints").is_dir() or not any((workdir / "checkpoints").iterdir()):
        extra = options
    else:
        extra = tuple(o for pair in zip(options[::2], options[1::2], strict=True)
                      if pair[0] != "--init-from" for o in pair)  # fmt: skip
    call("run_pretraining.py", f"configs/{recipe}.py", "--data-dir", data, "--workdir", workdir,
         *extra)  # fmt: skip
    rows = read_metrics(workdir / "metrics.jsonl")
    evaluated = [row for row in rows if "validation/perplexity" in row]
    logged = [row for row in rows if row.get("tokens_per_second")]
    steps = [0, *(int(row["step"]) for row in logged)]
    seconds = sum(
        (now - before) * row["tokens"] / row["tokens_per_second"]
        for before, now, row in zip(steps, steps[1:], logged, strict=False)
    )
    return {
        "recipe": recipe,
        "steps": steps[-1],
        "training_seconds": round(seconds, 1),
        "perplexity_by_step": {
            int(row["step"]): round(row["validation/perplexity"], 2) for row in evaluated
        },
    }


def perplexity(workdir: Path, data: Path) -> float:
    """On the validation split of a dataset, under the masks of the workdir's own recipe."""
    said = call("tools/evaluate.py", workdir, "--data-dir", data, "--json")
    return round(json.loads(said)["figures"]["perplexity"], 2)


def main(argv: list[str]) -> None:
    """Runs all of it and writes the record."""
    arguments = parser().parse_args(argv)
    work = arguments.work.resolve()
    prepare(work, corpora())
    wiki, reviews, general = work / "wiki", work / "reviews", work / "general"
    start = ("--init-from", general)
    runs = {"general": trained("general_small", wiki, general)}
    runs["adapted"] = trained("domain_adaptation_small", reviews, work / "adapted", *start)
    steps = ("--set", f"steps={runs['adapted']['steps']}")
    runs["control"] = trained("domain_adaptation_small", wiki, work / "control", *start, *steps)
    figures = {
        name: {
            "reviews": perplexity(work / name, reviews),
            "wikipedia": perplexity(work / name, wiki),
        }
        for name in ("adapted", "control")
    }
    # The general model's own recipe masks otherwise: the adapted run's first figures are its.
    for name, run in (("reviews", "adapted"), ("wikipedia", "control")):
        figures.setdefault("general", {})[name] = runs[run]["perplexity_by_step"][0]
    models = [work / name for name in ("general", "control", "adapted")]
    guesses = {}
    for model in models:
        lines = call("tools/fill_mask.py", model, *SENTENCES, "--json").splitlines()
        filled = [json.loads(line) for line in lines]
        guesses[model.name] = {
            row["text"]: [[g["token"], round(g["probability"], 4)] for g in row["masks"][0]]
            for row in filled
        }
    classes = [
        part for name in CLASSES for part in ("--class", work / "reviews_text" / f"{name}.txt")
    ]
    probe = json.loads(call("tools/probe.py", *models, *classes, "--data-dir", reviews, "--json"))
    for row in probe["models"]:
        row["model"] = Path(row["model"]).name
    reduction = 1 - figures["adapted"]["reviews"] / figures["control"]["reviews"]
    top = [token for token, _ in guesses["adapted"][SENTENCES[0]]]
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "packages": {n: importlib.metadata.version(n) for n in ("jax", "flax", "numpy")},
        "runs": runs,
        "perplexity": figures,
        "reduction_against_control": round(reduction, 4),
        "target_reduction": TARGET_REDUCTION,
        "film_or_movie_in_top_5": bool({"film", "movie"} & set(top)),
        "guesses": guesses,
        "probe": probe,
    }
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({k: result[k] for k in ("perplexity", "reduction_against_control", "probe")}))


if __name__ == "__main__":
    program.run(main)
