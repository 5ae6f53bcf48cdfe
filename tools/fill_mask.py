"""Shows what a masked language model puts where a sentence says [MASK].

    python tools/fill_mask.py runs/quickstart "Return the [MASK] of the string."
    python tools/fill_mask.py bert-base-uncased "Paris is the [MASK] of [MASK]." --top-k 3
    python tools/fill_mask.py FOLDER < sentences.txt

MODEL is a workdir, a Hugging Face folder or a hub id. [MASK] and <mask> both stand for the
model's own mask token. Probabilities are over the whole vocabulary.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from flaxpretrain import program
from flaxpretrain.conversion.sources import load_pretrained
from flaxpretrain.errors import UserError
from flaxpretrain.evaluation.fill_mask import MaskFiller, show


def parser() -> program.Parser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="a workdir, a folder or a hub id")
    parser.add_argument(
        "texts", metavar="TEXT", nargs="*", help="with [MASK]; none: one a line of standard input"
    )
    parser.add_argument("--top-k", type=int, default=5, help="guesses for each mask")
    parser.add_argument("--special", action="store_true", help="admit special tokens as guesses")
    parser.add_argument("--step", type=int, help="of a workdir's checkpoint; none: the newest")
    parser.add_argument("--part", help="which network; none: the one with a masked LM head")
    parser.add_argument("--tokenizer", type=Path, help="its folder; none: the model's own")
    parser.add_argument("--json", action="store_true", help="one JSON object a text")
    return parser


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
    """Fills the masks and prints the guesses."""
    arguments = parser().parse_intermixed_args(argv)
    texts = texts_of(arguments)
    config, params, tokenizer = load_pretrained(
        arguments.model, step=arguments.step, part=arguments.part, head="mlm"
    )
    filler = MaskFiller(config, params, arguments.tokenizer or tokenizer, special=arguments.special)
    console = Console()
    for filled in filler.fill(texts, arguments.top_k):
        if arguments.json:
            masks = [[guess._asdict() for guess in guesses] for guesses in filled.masks]
            print(json.dumps({"text": filled.text, "masks": masks}, ensure_ascii=False))
        else:
            show(filled, console)


if __name__ == "__main__":
    program.run(main)
