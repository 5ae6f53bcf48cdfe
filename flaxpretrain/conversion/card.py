"""The model card: what was trained on what, how well it does, and how to repeat it."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from flaxpretrain.conversion.licences import licence_fields
from flaxpretrain.conversion.public import public, public_command, public_path, public_values

_MOST_SOURCES = 20
_SIZES = (
    (("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), "layers"),
    (("num_decoder_layers", "decoder_layers"), "in the decoder"),
    (("hidden_size", "n_embd", "d_model", "dim"), "wide"),
    (
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
        "attention heads",
    ),
    (("vocab_size",), "tokens"),
)
"""Options of the families' configurations, and what to call them."""
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual|code")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card tells. Everything may be unknown; nothing unknown is invented.

    name: of the model, the card's title.
    run: the run as `config.render` gives it.
    dataset: the content of dataset.json.
    environment: the content of run.json: packages and devices.
    figures: the newest evaluation figures.
    step: training steps done.
    command: what was typed to train the model.
    base_model: the hub id of the model that training started from.
    licence: of the model; where None, that of the corpus.
    """

    name: str
    run: Mapping[str, Any] | None = None
    dataset: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    step: int | None = None
    command: str = ""
    base_model: str | None = None
    licence: str | None = None

    @property
    def corpus_licence(self) -> str | None:
        """The licence of the text, also from run.json, for when the dataset is out of reach."""
        return self._of_dataset("licence")

    @property
    def attribution(self) -> str | None:
        """Whom the corpus asks to name."""
        return self._of_dataset("attribution")

    def _of_dataset(self, name: str) -> str | None:
        return self.dataset.get(name) or self.environment.get("dataset", {}).get(name)


def model_card(
    facts: Facts,
    values: Mapping[str, Any],
    parameters: int,
    mask: str | None,
    heads: Sequence[str] = ("mlm",),
) -> str:
    """The text of README.md.

    Args:
        facts: what is known of the model.
        values: the content of its config.json.
        parameters: how many numbers it consists of.
        mask: the tokenizer's mask token.
        heads: what stands on the network: "mlm" fills masks, "lm" writes text.
    """
    if "mlm" not in heads:
        mask = None
    task = "fill-mask" if mask is not None else "feature-extraction"
    if "lm" in heads:
        task = "text2text-generation" if values.get("is_encoder_decoder") else "text-generation"
    head = front_matter(facts, values, task).to_yaml(line_break="\n").strip()
    sections = [
        f"# {public_path(facts.name)}\n\n{_summary(facts, values, parameters)}",
        _usage(mask, task),
        _data(facts),
        _training(facts),
        _evaluation(facts),
        _repeating(facts),
        "## Limits\n\nThe model repeats what its training text says, errors and prejudices "
        "included. It was trained to predict text, not to state facts.",
    ]
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{head}\n---\n\n{body}\n"


def front_matter(facts: Facts, values: Mapping[str, Any], task: str) -> ModelCardData:
    """The card's metadata, with nothing in it that the hub would refuse."""
    language = facts.dataset.get("language")
    languages = [language] if isinstance(language, str) else list(language or ())
    datasets = [i for i in map(_hub_dataset, facts.dataset.get("sources", ())) if i]
    licence = facts.licence or facts.corpus_licence
    fields: dict[str, Any] = {
        **licence_fields(licence),
        "language": [code for code in languages if _LANGUAGE.fullmatch(code)] or None,
        "datasets": sorted(set(datasets)) or None,
        "base_model": facts.base_model if _is_repo_id(facts.base_model) else None,
        "pipeline_tag": task,
        "library_name": "transformers",
        "tags": ["flaxpretrain", "jax", str(values.get("model_type"))],
    }
    return ModelCardData(**{name: value for name, value in fields.items() if value is not None})


def _source_name(source: Any) -> str:
    if isinstance(source, Mapping):
        for key in ("name", "path", "file", "source"):
            if source.get(key):
                return str(source[key])
        return json.dumps(public_values(source), sort_keys=True)
    return str(source)


def _hub_dataset(source: Any) -> str | None:
    """The hub id of a source spelled `hf:owner/name[:config]`."""
    name = _source_name(source)
    identity = name.removeprefix("hf:").split(":")[0].split("@")[0]
    return identity if name.startswith("hf:") and _is_repo_id(identity) else None


def _is_repo_id(text: str | None) -> bool:
    if not text:
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _class_name(rendered: Any) -> str | None:
    return rendered["class"].rpartition(".")[2] if isinstance(rendered, Mapping) else None


def _summary(facts: Facts, values: Mapping[str, Any], parameters: int) -> str:
    sizes = []
    for fields, what in _SIZES:
        found = next((values[f] for f in fields if isinstance(values.get(f), int)), None)
        if found is not None:
            sizes.append(f"{found:,} {what}")
    kind = (values.get("architectures") or [values.get("model_type")])[0]
    objective = _class_name((facts.run or {}).get("objective"))
    how = f", pretrained with the objective {objective}" if objective else ""
    steps = f" for {facts.step:,} steps" if facts.step and objective else ""
    start = f" from the weights of {public_path(facts.base_model)}" if facts.base_model else ""
    by = "in JAX with flaxpretrain" if objective else "converted with flaxpretrain"
    return f"A {kind} ({', '.join(sizes)}; {parameters:,} parameters){how}{steps}{start}, {by}."


def _usage(mask: str | None, task: str) -> str:
    if task.endswith("generation"):
        kind = "AutoModelForCausalLM" if task == "text-generation" else "AutoModelForSeq2SeqLM"
        return (
            f"## Use\n\n```python\nfrom transformers import {kind}, AutoTokenizer\n\n"
            'name = "PATH_OR_HUB_ID_OF_THIS_MODEL"\n'
            "tokenizer = AutoTokenizer.from_pretrained(name)\n"
            f"model = {kind}.from_pretrained(name)\n"
            'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))\n```"
        )
    if mask is None:
        return ""
    return (
        "## Use\n\n```python\nfrom transformers import pipeline\n\n"
        'fill_mask = pipeline("fill-mask", model="PATH_OR_HUB_ID_OF_THIS_MODEL")\n'
        f'fill_mask("This is a great {mask}.")\n```'
    )


def _data(facts: Facts) -> str:
    lines = []
    if not facts.dataset and not facts.environment:
        return ""
    sources = [public_path(_source_name(s)) for s in facts.dataset.get("sources", ())]
    if sources:
        more = len(sources) - _MOST_SOURCES
        shown = ", ".join(sources[:_MOST_SOURCES]) + (f" and {more} more" if more > 0 else "")
        lines.append(f"- Sources: {shown}")
    for name, split in facts.dataset.get("splits", {}).items():
        lines.append(
            f"- {name}: {split['documents']:,} documents, {split['tokens']:,} tokens, "
            f"{split['bytes'] / 1e6:,.1f} MB of text"
        )
    language = facts.dataset.get("language")
    if language:
        lines.append(
            f"- Language: {language if isinstance(language, str) else ', '.join(language)}"
        )
    corpus = facts.corpus_licence
    lines.append(f"- Licence of the text: {public(corpus) if corpus else 'not stated'}")
    if facts.attribution:
        lines.append(f"- Attribution: {public(facts.attribution)}")
    return "## Training data\n\n" + "\n".join(lines)


def _training(facts: Facts) -> str:
    run = facts.run
    if run is None:
        return ""
    rows = []
    for number, phase in enumerate(run.get("phases", ())):
        length = next(
            (f"{phase[n]:,} {n}" for n in ("steps", "tokens", "epochs", "seconds") if phase.get(n)),
            "",
        )
        rows.append(
            (
                f"phase {number + 1}",
                f"{length}, rows of {phase['length']}, batches of {phase['batch_size']}",
            )
        )
    for field in ("optimizer", "schedule"):
        value = run.get(field)
        if isinstance(value, Mapping):
            settings = ", ".join(
                f"{n} {json.dumps(v)}" for n, v in value.items() if n != "class" and v is not None
            )
            rows.append((field, f"{_class_name(value)}: {settings}"))
    formats = run.get("precision") or {}
    narrow = formats.get("matmul", "default")
    also = "" if narrow == "default" else f", {narrow} matrix products"
    rows.append(("precision", f"{formats.get('compute', '')}{also}"))
    devices = facts.environment.get("devices", {})
    if devices:
        rows.append(("devices", f"{devices.get('count')} x {devices.get('kind')}"))
    return "## Training\n\n" + _table(("setting", "value"), rows)


def _evaluation(facts: Facts) -> str:
    if not facts.figures:
        return ""
    rows = [(name, f"{value:.4f}") for name, value in sorted(facts.figures.items())]
    note = "Losses are in nats; masked positions were chosen once, by a fixed seed."
    return f"## Evaluation\n\n{note}\n\n" + _table(("figure", "value"), rows)


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {a} | {b.replace('|', chr(92) + '|')} |" for a, b in lines)


def _repeating(facts: Facts) -> str:
    parts = []
    if facts.command:
        parts.append(f"```\n{public_command(facts.command)}\n```")
    versions = facts.environment.get("packages", {})
    if versions:
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        own = facts.environment.get("flaxpretrain")
        parts.append(f"With flaxpretrain {own}, {listed}.")
    if facts.run is not None:
        text = json.dumps(public_values(facts.run), indent=2)
        parts.append(
            "<details><summary>The whole configuration</summary>\n\n"
            f"```json\n{text}\n```\n\n</details>"
        )
    return "## Repeating the run\n\n" + "\n\n".join(parts) if parts else ""
