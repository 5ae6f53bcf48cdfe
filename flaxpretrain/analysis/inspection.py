"""What training sees: the kinds of tokens in a batch, how long rows and masks are, how much pads.

Works on the arrays of any batch: masked ones, those of encoder-decoders and of causal models.
"""

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Batch, Int, Numpy

_BINS = 10
_BAR = 40
_SAMPLED_ROWS = 16
_LONGEST_RUN = 16
"""Runs of more masked tokens are counted together."""


class Kind(enum.IntEnum):
    """What a token is to the model: targets are MASKED, RANDOM and KEPT."""

    PADDING = 0
    SPECIAL = 1
    TEXT = 2
    MASKED = 3
    RANDOM = 4
    KEPT = 5


STYLES = {
    Kind.PADDING: "dim",
    Kind.SPECIAL: "dim",
    Kind.TEXT: "",
    Kind.MASKED: "bold red",
    Kind.RANDOM: "bold yellow",
    Kind.KEPT: "bold cyan",
}
"""Colours on a terminal; what was there originally is green."""


def kinds_of(batch: Batch, vocabulary: Vocabulary) -> Int[Numpy, "B L"]:
    """The `Kind` of every token that the network (the encoder, where there are two) reads.

    Where nothing says which tokens were masked, [MASK] and sentinels are.
    """
    ids, real = batch["input_ids"], batch["segment_ids"] > 0
    kinds = np.where(real, Kind.TEXT, Kind.PADDING)
    special = np.isin(ids, np.array(vocabulary.special_ids, np.int64))
    kinds[real & special] = Kind.SPECIAL
    mask = -1 if vocabulary.mask is None else vocabulary.mask
    noise = np.array([mask, *vocabulary.sentinels], np.int64)
    if "masked_positions" not in batch:
        kinds[real & np.isin(ids, noise)] = Kind.MASKED
        return kinds
    row, slot = np.nonzero(batch["masked_weights"] > 0)
    place, label = batch["masked_positions"][row, slot], batch["masked_labels"][row, slot]
    here = ids[row, place]
    same = np.where(here == label, Kind.KEPT, Kind.RANDOM)
    kinds[row, place] = np.where(here == mask, Kind.MASKED, same)
    return kinds


def run_lengths(inside: np.ndarray) -> Int[Numpy, " R"]:
    """How long each run of True is in the rows of a boolean array [B, L]."""
    edges = np.diff(np.pad(inside.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    return np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]


def _hidden_runs(batch: Batch, kinds: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Lengths of what was hidden in one go: runs of targets, or spans that a decoder must say."""
    if "masked_positions" in batch:
        return run_lengths(kinds >= Kind.MASKED)
    if vocabulary.sentinels and "decoder_input_ids" in batch:
        said = batch["label_weights"] > 0
        special = np.isin(batch["labels"], np.array(vocabulary.special_ids, np.int64))
        if np.isin(batch["labels"][said], np.array(vocabulary.sentinels)).any():
            return run_lengths(said & ~special)
    return run_lengths(kinds == Kind.MASKED)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Counts over some batches.

    length: of the longest rows. positions: of all rows. row_tokens: of each row, tokens that are no
    padding. piece_tokens: of each piece of text. runs: how often so many neighbouring tokens were
    hidden in one go. kinds: how many tokens of each. unknown: tokens of text that the vocabulary
    lacks, of `text` tokens looked at.
    target_length, target_tokens: of decoders, as length and row_tokens; 0 and empty without one.
    sample: kinds of the tokens of a few rows [R, L].
    """

    length: int
    positions: int
    row_tokens: np.ndarray
    piece_tokens: np.ndarray
    runs: Mapping[int, int]
    kinds: Mapping[Kind, int]
    unknown: int
    text: int
    target_length: int
    target_tokens: np.ndarray
    predictions: float
    sample: np.ndarray

    @property
    def padding_share(self) -> float:
        """Which part of the positions is padding, on both sides of an encoder-decoder together."""
        positions = self.positions + self.target_length * len(self.target_tokens)
        return 1 - (self.row_tokens.sum() + self.target_tokens.sum()) / positions

    @property
    def unknown_share(self) -> float:
        """Which part of the text the vocabulary lacks."""
        return self.unknown / max(self.text, 1)


def inspect(batches: Iterable[Batch], vocabulary: Vocabulary) -> Inspection:
    """Counts what is in batches; rows may be of several lengths.

    Raises:
        UserError: there are none.
    """
    rows, pieces, targets, runs = [], [], [], []
    kinds, unknown, text, predictions = np.zeros(len(Kind), np.int64), 0, 0, 0.0
    length = target_length = positions = 0
    sample = np.zeros((0, 0), np.int64)
    for batch in batches:
        length = max(length, batch["input_ids"].shape[1])
        positions += batch["input_ids"].size
        segments, of_batch = batch["segment_ids"], kinds_of(batch, vocabulary)
        sample = sample if rows else of_batch[:_SAMPLED_ROWS]
        kinds += np.bincount(of_batch.ravel(), minlength=len(Kind))
        rows.append((segments > 0).sum(axis=1))
        places = np.arange(len(segments))[:, None] * (segments.max(initial=0) + 1) + segments
        sizes = np.bincount(places[segments > 0])
        pieces.append(sizes[sizes > 0])
        runs.append(_hidden_runs(batch, of_batch, vocabulary))
        originals = [batch["input_ids"][(of_batch == Kind.TEXT) | (of_batch == Kind.SPECIAL)]]
        if "masked_labels" in batch:
            originals.append(batch["masked_labels"][batch["masked_weights"] > 0])
            predictions += float((batch["masked_weights"] > 0).sum())
        if "label_weights" in batch:
            predictions += float((batch["label_weights"] > 0).sum())
        if "decoder_input_ids" in batch:
            originals.append(batch["labels"][batch["label_weights"] > 0])
            target_length = batch["labels"].shape[1]
            targets.append((batch["label_weights"] > 0).sum(axis=1))
        for ids in originals:
            is_unknown = ids == (-1 if vocabulary.unk is None else vocabulary.unk)
            special = np.isin(ids, np.array(vocabulary.special_ids, np.int64))
            unknown += int(is_unknown.sum())
            text += int((is_unknown | ~special).sum())
    if not rows:
        raise UserError("there are no batches to look at")
    found = np.minimum(np.concatenate(runs), _LONGEST_RUN)
    return Inspection(
        length=length,
        positions=positions,
        row_tokens=np.concatenate(rows),
        piece_tokens=np.concatenate(pieces),
        runs={int(n): int(c) for n, c in zip(*np.unique(found, return_counts=True), strict=True)},
        kinds={kind: int(kinds[kind]) for kind in Kind},
        unknown=unknown,
        text=text,
        target_length=target_length,
        target_tokens=np.concatenate(targets) if targets else np.zeros(0, np.int64),
        predictions=predictions,
        sample=sample,
    )


def report(found: Inspection) -> list[str]:
    """The counts as lines with bars."""
    count = len(found.row_tokens)
    lines = [
        f"{count:,} rows of {found.length} tokens{_or_less(found)}"
        + (f" and targets of {found.target_length}" if found.target_length else "")
        + f": {found.padding_share:.2%} padding, "
        f"{len(found.piece_tokens) / max(count, 1):.2f} pieces a row, "
        f"{found.predictions / max(count, 1):.1f} predictions a row",
        f"unknown tokens: {found.unknown:,} of {found.text:,}, {found.unknown_share:.3%}",
    ]
    targets = {kind: found.kinds[kind] for kind in (Kind.MASKED, Kind.RANDOM, Kind.KEPT)}
    if any(targets.values()):
        total = sum(targets.values())
        shares = ", ".join(f"{n / total:.1%} {kind.name.lower()}" for kind, n in targets.items())
        real = sum(n for kind, n in found.kinds.items() if kind != Kind.PADDING)
        lines.append(f"hidden: {total / real:.2%} of the tokens read; of these {shares}")
    lines += _histogram("tokens a row", found.row_tokens, found.length)
    if len(found.target_tokens):
        lines += _histogram("tokens a target", found.target_tokens, found.target_length)
    lines += _histogram("tokens a piece", found.piece_tokens, found.length)
    if found.runs:
        mean = sum(n * c for n, c in found.runs.items()) / sum(found.runs.values())
        lines.append(f"tokens hidden in one go (mean {mean:.2f})")
        lines += _bars([(_run_name(n), c) for n, c in found.runs.items()])
    return lines


def _or_less(found: Inspection) -> str:
    return "" if found.positions == found.length * len(found.row_tokens) else " or less"


def _run_name(length: int) -> str:
    return f"{length}+" if length == _LONGEST_RUN else str(length)


def _histogram(title: str, values: np.ndarray, most: int) -> list[str]:
    counts, edges = np.histogram(values, bins=min(_BINS, most), range=(0, most))
    names = [f"{int(np.ceil(a))}-{int(b)}" for a, b in zip(edges, edges[1:], strict=False)]
    lines = [f"{title} (mean {values.mean():.1f}, longest {values.max(initial=0)})"]
    return lines + _bars(list(zip(names, counts.tolist(), strict=True)))


def _bars(counts: Sequence[tuple[str, int]]) -> list[str]:
    total = max(sum(count for _, count in counts), 1)
    return [
        f"  {name:>9} {count / total:7.2%} {'█' * round(_BAR * count / total)}"
        for name, count in counts
    ]


def pieces_of(backend: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, with the space before it where a word begins."""
    decodes_bytes = type(backend.decoder).__name__ == "ByteLevel"
    pieces = []
    for number in ids:
        token = backend.id_to_token(number)
        if token is None:
            pieces.append(f" <{number}>")
        elif decodes_bytes:
            pieces.append(backend.decode([number], skip_special_tokens=False))
        elif token.startswith("▁"):
            pieces.append(" " + token[1:])
        else:
            pieces.append(token[2:] if token.startswith("##") and len(token) > 2 else " " + token)
    return pieces


def coloured_row(batch: Batch, row: int, vocabulary: Vocabulary, backend: Any) -> list[Text]:
    """A row as the network reads it, what was there in its place, and what a decoder must say."""
    kinds = kinds_of(batch, vocabulary)[row]
    labels: dict[int, int] = {}
    if "masked_positions" in batch:
        used = batch["masked_weights"][row] > 0
        places, wanted = batch["masked_positions"][row, used], batch["masked_labels"][row, used]
        labels = dict(zip(places.tolist(), wanted.tolist(), strict=True))
    real = int((kinds > Kind.PADDING).sum())
    line = Text("reads:")
    for place, piece in enumerate(pieces_of(backend, batch["input_ids"][row, :real].tolist())):
        kind = Kind(int(kinds[place]))
        line.append(piece, style=STYLES[kind])
        if kind in (Kind.MASKED, Kind.RANDOM) and place in labels:
            (original,) = pieces_of(backend, [labels[place]])
            line.append(f"‹{original.strip()}›", style="green")
        elif kind == Kind.KEPT:
            line.append("‹=›", style="green")
    if len(kinds) > real:
        line.append(f" + {len(kinds) - real} padding", style="dim")
    lines = [line]
    if "label_weights" in batch:
        said = batch["labels"][row][batch["label_weights"][row] > 0].tolist()
        target = Text("says:", style="green")
        for number, piece in zip(said, pieces_of(backend, said), strict=True):
            target.append(piece, style="bold red" if number in vocabulary.sentinels else "green")
        lines.append(target)
    return lines


LEGEND = Text.assemble(
    ("hidden", STYLES[Kind.MASKED]),
    ", ",
    ("replaced at random", STYLES[Kind.RANDOM]),
    ", ",
    ("kept but asked for ‹=›", STYLES[Kind.KEPT]),
    ", ",
    ("‹what stood there›", "green"),
)


def picture(found: Inspection, path: Path, title: str) -> None:
    """The same as a picture: some rows in colour, and four charts; the suffix says the format.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--picture needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(11, 10), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="x-large")
    panels = figure.subplot_mosaic("tt;rp;mk", height_ratios=(1.1, 1, 1))
    _draw_rows(panels["t"], found)
    rows, pieces, runs, tokens = (panels[name] for name in "rpmk")
    bins = {"bins": 40, "range": (0, found.length)}
    rows.hist(found.row_tokens, label="read", color=_BARS, **bins)
    if len(found.target_tokens):
        most = (0, found.target_length)
        rows.hist(found.target_tokens, bins=40, range=most, alpha=0.6, label="to say")
        rows.legend(frameon=False)
    title = f"Tokens a row ({found.padding_share:.2%} padding)"
    rows.set(title=title, xlabel="tokens", ylabel="rows")
    pieces.hist(found.piece_tokens, color=_BARS, **bins)
    pieces.set(title="Tokens a piece of text", xlabel="tokens", ylabel="pieces")
    names, counts = [_run_name(n) for n in found.runs], list(found.runs.values())
    _label(runs, runs.bar(names, counts, color=_COLOURS[Kind.MASKED]), counts)
    runs.set(title="Tokens hidden in one go", xlabel="tokens", ylabel="times")
    names, counts = [kind.name.lower() for kind in Kind], [found.kinds[kind] for kind in Kind]
    bars = tokens.bar(names, counts, color=[_COLOURS[kind] for kind in Kind])
    _label(tokens, bars, counts)
    tokens.set(title=f"Kinds of tokens ({found.unknown_share:.3%} unknown)", yticks=[])
    for panel in (rows, pieces, runs, tokens):
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(y=0.12)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--picture {path} cannot be written: {error}") from error


_BARS = "#4c72b0"
_COLOURS = {
    Kind.PADDING: "#ffffff",
    Kind.SPECIAL: "#55596b",
    Kind.TEXT: "#d5dbe8",
    Kind.MASKED: "#c8352f",
    Kind.RANDOM: "#e5a50a",
    Kind.KEPT: "#2aa1b3",
}
"""Of a picture; as on a terminal, red, yellow and cyan are what the model must predict."""


def _draw_rows(panel: Any, found: Inspection) -> None:
    """A line a row, a dot a token."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = [_COLOURS[kind] for kind in Kind]
    panel.imshow(
        found.sample, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5,
        aspect="auto", interpolation="nearest",
    )  # fmt: skip
    # White lines between the rows.
    panel.set_yticks(np.arange(1, len(found.sample)) - 0.5, labels=[])
    panel.grid(axis="y", color="white", linewidth=1.5)
    panel.tick_params(left=False)
    panel.set(title=f"The first {len(found.sample)} rows", xlabel="position")
    present = [kind for kind in Kind if found.kinds[kind]]
    panel.legend(
        handles=[
            Patch(facecolor=_COLOURS[kind], edgecolor="#999999", label=kind.name.lower())
            for kind in present
        ],
        ncols=len(present), loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False,
    )  # fmt: skip


def _label(panel: Any, bars: Any, counts: Sequence[int]) -> None:
    """Writes the share of each bar above it."""
    total = max(sum(counts), 1)
    if len(counts) <= 2 * _BINS:
        panel.bar_label(bars, [f"{count / total:.1%}" for count in counts], fontsize="small")


__all__ = [
    "LEGEND",
    "STYLES",
    "Inspection",
    "Kind",
    "coloured_row",
    "inspect",
    "kinds_of",
    "picture",
    "pieces_of",
    "report",
    "run_lengths",
]
