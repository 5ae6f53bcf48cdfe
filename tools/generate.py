"""Goes on from texts with a decoder, or answers them with an encoder-decoder.

    python tools/generate.py runs/gpt2_tiny "The capital of France" --top-p 0.9 --count 3
    python tools/generate.py google-t5/t5-small "translate English to German: Good day." --beams 4
    python tools/generate.py gpt2 "The capital of France is" --next-token
    python tools/generate.py gpt2 --score "The capital of France is" --continuations Paris Vienna
    python tools/generate.py FOLDER < prompts.txt

MODEL is a workdir, a Hugging Face folder or a hub id. Without further flags the likeliest token
follows, always; --sample, --temperature, --top-k and --top-p draw, and --beams searches for the
likeliest text. A prompt to a decoder opens a document, unless --no-begin says otherwise. How varied
the texts are is said at the end: distinct n-grams, and 4-grams repeated within a text.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.text import Text

from flaxpretrain import program
from flaxpretrain.conversion.sources import load_pretrained
from flaxpretrain.errors import UserError
from flaxpretrain.evaluation.fill_mask import bar_of
from flaxpretrain.evaluation.subject import generation_settings
from flaxpretrain.generation.strategies import (
    Beam,
    Filter,
    Greedy,
    Sample,
    Strategy,
    Temperature,
    TopK,
    TopP,
)
from flaxpretrain.generation.writer import Writer, diversity

_EARLY = {"true": True, "false": False, "never": "never"}
_BAR = 24


def parser() -> program.Parser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="a workdir, a folder or a hub id")
    parser.add_argument(
        "texts", metavar="TEXT", nargs="*", help="none: one a line of standard input"
    )
    parser.add_argument("--max-new-tokens", type=int, default=40, help="most tokens of a text")
    parser.add_argument("--count", type=int, default=1, help="texts for each prompt")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--sample", action="store_true", help="draw each token")
    parser.add_argument("--temperature", type=float, help="draw from scores divided by this")
    parser.add_argument(
        "--top-k", type=int, help="draw from so many tokens; of --next-token, show so many, or 10"
    )
    parser.add_argument("--top-p", type=float, help="draw from the tokens with this share")
    parser.add_argument("--beams", type=int, help="search with so many beginnings")
    parser.add_argument(
        "--length-penalty", type=float, default=1.0, help="of beams; above 0 prefers longer texts"
    )
    parser.add_argument(
        "--early-stopping", choices=_EARLY, default="false", help="of beams; as in Transformers"
    )
    rules = "none: as the model's generation configuration says"
    parser.add_argument("--repetition-penalty", type=float, help=f"above 1 repeats less; {rules}")
    parser.add_argument("--no-repeat-ngram-size", type=int, help=f"in tokens; {rules}")
    parser.add_argument("--min-new-tokens", type=int, help=f"least tokens of a text; {rules}")
    parser.add_argument("--forced-bos", metavar="TOKEN", help=f"opens every answer; {rules}")
    parser.add_argument("--next-token", action="store_true", help="show the likeliest next tokens")
    parser.add_argument("--score", metavar="TEXT", help="rank the --continuations of this text")
    parser.add_argument("--continuations", nargs="+", metavar="TEXT", help="for --score")
    parser.add_argument("--joint", default=" ", help="between the text of --score and the others")
    parser.add_argument(
        "--no-begin", action="store_true", help="put no token in front that opens a document"
    )
    parser.add_argument("--step", type=int, help="of a workdir's checkpoint; none: the newest")
    parser.add_argument("--part", help="which network; none: the one with a language head")
    parser.add_argument("--tokenizer", type=Path, help="its folder; none: the model's own")
    parser.add_argument(
        "--compute", choices=("float32", "bfloat16"), default="float32", help="number format"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a text")
    return parser


def strategy_of(arguments) -> Strategy:
    """How tokens are chosen; raises UserError on flags that exclude each other."""
    filters: list[Filter] = []
    for kind, value in (
        (Temperature, arguments.temperature),
        (TopK, arguments.top_k),
        (TopP, arguments.top_p),
    ):
        if value is not None:
            filters.append(kind(value))
    draws = arguments.sample or bool(filters)
    if arguments.beams is not None:
        if draws:
            raise UserError(
                "--beams searches and --sample, --temperature, --top-k and --top-p draw: give one "
                "or the other"
            )
        return Beam(arguments.beams, arguments.length_penalty, _EARLY[arguments.early_stopping])
    return Sample(tuple(filters)) if draws else Greedy()


def rules_of(arguments, writer: Writer) -> dict[str, Any]:
    """What the flags change in the model's own rules."""
    names = ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")
    given = {n: getattr(arguments, n) for n in names if getattr(arguments, n) is not None}
    if arguments.forced_bos is not None:
        token = writer.tokenizer.backend.token_to_id(arguments.forced_bos)
        if token is None:
            raise UserError(f"--forced-bos: the tokenizer has no token {arguments.forced_bos!r}")
        given["forced_bos"] = token
    return given


def texts_of(arguments) -> list[str]:
    """The texts of the command line, else the lines of standard input that are not empty."""
    texts = arguments.texts
    if not texts:
        if sys.stdin.isatty():
            print("reading texts from standard input, one a line", file=sys.stderr)
        texts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise UserError("no text: give one or more as arguments, or lines on standard input")
    return texts


def main(argv: list[str]) -> None:
    """Generates, guesses or ranks, and prints."""
    arguments = parser().parse_intermixed_args(argv)
    if (arguments.score is None) != (arguments.continuations is None):
        raise UserError("--score TEXT and --continuations TEXT ... go together: give both")
    strategy = strategy_of(arguments)
    texts = [] if arguments.score is not None else texts_of(arguments)
    config, params, tokenizer = load_pretrained(
        arguments.model, step=arguments.step, part=arguments.part, head="lm"
    )
    writer = Writer(
        config,
        params,
        arguments.tokenizer or tokenizer,
        generation=generation_settings(arguments.model, tokenizer),
        begins=not arguments.no_begin,
        compute=arguments.compute,
    )
    if arguments.score is not None:
        rank(arguments, writer)
    elif arguments.next_token:
        guess(arguments, writer, texts)
    else:
        generate(arguments, writer, texts, strategy)


def generate(arguments, writer: Writer, texts: list[str], strategy: Strategy) -> None:
    """Prints the texts, and how varied they are."""
    found = writer.write(
        texts,
        strategy,
        max_new_tokens=arguments.max_new_tokens,
        count=arguments.count,
        seed=arguments.seed,
        rules=rules_of(arguments, writer),
    )
    figures = diversity([written.ids for some in found for written in some])
    if arguments.json:
        for text, some in zip(texts, found, strict=True):
            rows = [written._asdict() for written in some]
            print(json.dumps({"text": text, "generated": rows}, ensure_ascii=False))
        print(json.dumps({"diversity": figures}))
        return
    console = Console()
    for text, some in zip(texts, found, strict=True):
        for written in some:
            line = Text(text, style="bold")
            line.append("" if not writer.generator.has_encoder else "\n  ")
            line.append(Text(written.text, style="not bold"))
            if not written.ended:
                line.append("…", style="dim")
            if written.score is not None:
                line.append(f"  [{written.score:.3f}]", style="dim")
            console.print(line, soft_wrap=True)
    shown = ", ".join(f"{name.replace('_', '-')} {value:.2f}" for name, value in figures.items())
    console.print(Text(shown, style="dim"))


def guess(arguments, writer: Writer, texts: list[str]) -> None:
    """Prints the likeliest next tokens of each text, a line a token: probability, bar, token."""
    top_k = min(10, writer.generator.config.vocab_size)
    found = writer.next_tokens(texts, top_k if arguments.top_k is None else arguments.top_k)
    console = Console()
    for text, guesses in zip(texts, found, strict=True):
        if arguments.json:
            rows = [each._asdict() for each in guesses]
            print(json.dumps({"text": text, "next": rows}, ensure_ascii=False))
            continue
        console.print(Text(text, style="bold"), soft_wrap=True)
        for each in guesses:
            line(console, each.probability, repr(each.token))


def rank(arguments, writer: Writer) -> None:
    """Prints the continuations, the likeliest first: share among them, bar, nats, text."""
    judged = writer.judge(arguments.score, arguments.continuations, arguments.joint)
    if arguments.json:
        rows = [each._asdict() for each in judged]
        print(json.dumps({"text": arguments.score, "continuations": rows}, ensure_ascii=False))
        return
    console = Console()
    console.print(Text(arguments.score, style="bold"), soft_wrap=True)
    for each in judged:
        tokens = f"{each.tokens} token{'s' * (each.tokens > 1)}"
        line(console, each.share, f"{each.text}  ({each.nats:.3f} nats, {tokens})")


def line(console: Console, share: float, text: str) -> None:
    """Prints a share, its bar and what it is of."""
    bar = Text(f"  {share:7.2%}  ").append(f"{bar_of(share, _BAR):<{_BAR}}", style="green")
    console.print(bar, Text(text), soft_wrap=True)


if __name__ == "__main__":
    program.run(main)
