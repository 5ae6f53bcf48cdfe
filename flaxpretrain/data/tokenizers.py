"""Loads, saves and applies tokenizers; reads special ids and word starts from them.

Built on the `tokenizers` library: what a dataset was encoded with is the very file that the
exported model carries. Training is in `tokenizer_training`, more tokens in `tokenizer_extension`.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as library
from tokenizers import models

from flaxpretrain.data.backends import (
    USUAL_NAMES,
    add_sentinels,
    byte_bpe_backend,
    frame_like_roberta,
    roles_by_name,
    special_token,
    wordpiece_backend,
)
from flaxpretrain.data.normalization import Normalization
from flaxpretrain.data.sentencepiece_model import backend_of, read_model
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.data.word_starts import WordRule, word_rule
from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Bool, Int, Numpy

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"
"""Where older releases of Transformers name the special tokens."""
SENTENCES = 512
"""Sentences encoded at once."""
SENTINEL = re.compile(r"<extra_id_(\d+)>")


class Tokenizer:
    """A tokenizer, the roles of its special tokens, and what a dataset needs to know of it."""

    def __init__(
        self,
        backend: library.Tokenizer,
        roles: Mapping[str, str],
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """`roles` maps names of `Vocabulary.TOKENS` to tokens; `settings` are kept for `save`.

        Raises:
          UserError: a role's token is not in the tokenizer.
        """
        backend = library.Tokenizer.from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.roles = dict(roles)
        self.settings = dict(settings or {})
        for role, token in self.roles.items():
            if backend.token_to_id(token) is None:
                raise UserError(
                    f"the tokenizer's configuration names {token!r} as {role} token, "
                    "but its vocabulary does not hold it"
                )

    def __reduce__(self):
        return _rebuild, (self.backend.to_str(), self.roles, self.settings)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """Size and special ids."""
        ids = self.backend.get_vocab(with_added_tokens=True)
        added = self.backend.get_added_tokens_decoder()
        matches = [(match, i) for token, i in ids.items() if (match := SENTINEL.fullmatch(token))]
        sentinels = tuple(i for match, i in sorted(matches, key=lambda pair: int(pair[0][1])))
        # The largest id and not the count: a vocabulary may have holes.
        return Vocabulary(
            size=max(ids.values()) + 1,
            sentinels=sentinels,
            special_ids=tuple(sorted(i for i, token in added.items() if token.special)),
            **{role: ids[token] for role, token in self.roles.items()},
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical tokenizer.json and the roles of special tokens."""
        content = [json.loads(self.backend.to_str()), self.roles]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @functools.cached_property
    def word_rule(self) -> WordRule:
        """Says of the ids of a text which open a word."""
        vocabulary = self.vocabulary
        return word_rule(self.backend, vocabulary.size, vocabulary.special_ids)

    @property
    def word_starts(self) -> Bool[Numpy, " V"]:
        """Whether each id opens a word wherever it stands; special tokens do."""
        return self.word_rule.opens

    def encode_sentences(
        self, sentences: Sequence[str]
    ) -> tuple[Int[Numpy, " T"], Int[Numpy, " S"]]:
        """Ids of all sentences, back to back, and how many each has; no special tokens are added.

        Text that spells a special token ("[MASK]", "<pad>") stays text: it is cut into ordinary
        tokens. Where a model has no other token for it, it becomes the unknown token.

        Raises:
          UserError: a sentence turns into a special token and there is no unknown token.
        """
        encode = self._text_backend.encode_batch_fast
        # Some at a time: an encoding takes a hundred bytes a token.
        ids_of_sentences = [
            encoding.ids
            for first in range(0, len(sentences), SENTENCES)
            for encoding in encode(sentences[first : first + SENTENCES], add_special_tokens=False)
        ]
        lengths = np.fromiter(map(len, ids_of_sentences), np.int64, len(sentences))
        tokens = itertools.chain.from_iterable(ids_of_sentences)
        ids = np.fromiter(tokens, np.int32, int(lengths.sum()))
        reserved = self._reserved[ids]
        if reserved.any():
            if self.vocabulary.unk is None:
                token = self.backend.id_to_token(int(ids[reserved][0]))
                raise UserError(
                    f"text turned into the special token {token!r} and the tokenizer has no "
                    "unknown token: remove the token from the text"
                )
            ids[reserved] = self.vocabulary.unk
        return ids, lengths

    def token_offsets(self, sentences: Sequence[str]) -> Int[Numpy, " T"]:
        """The character of its sentence with which each token of `encode_sentences` begins."""
        offsets = [
            first
            for number in range(0, len(sentences), SENTENCES)
            for encoding in self._text_backend.encode_batch(
                sentences[number : number + SENTENCES], add_special_tokens=False
            )
            for first, _ in encoding.offsets
        ]
        return np.array(offsets, np.int64)

    def save(self, folder: Path | str) -> None:
        """Writes what Transformers' `AutoTokenizer.from_pretrained` loads, and `vocab.txt`.

        The files are tokenizer.json, tokenizer_config.json and, for WordPiece, vocab.txt.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / TOKENIZER_FILE))
        # The generic class: it takes tokenizer.json as it is, where a model's own class would
        # rebuild normaliser and framing from its settings. Transformers 4 and 5 both know it.
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.settings,
            **{f"{role}_token": token for role, token in self.roles.items()},
        }
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        if isinstance(self.backend.model, models.WordPiece):
            ids = self.backend.get_vocab(with_added_tokens=True)
            ordered = sorted(ids, key=ids.__getitem__)
            (folder / "vocab.txt").write_text("\n".join(ordered) + "\n", encoding="utf-8")

    @functools.cached_property
    def _text_backend(self) -> library.Tokenizer:
        """The same tokenizer, for which special tokens in the text are text."""
        content = json.loads(self.backend.to_str())
        content["post_processor"] = None
        if content["model"]["type"] == "Unigram":
            # Unigram would find special tokens as pieces, the best ones, with their score of 0.
            special = {token["content"] for token in content["added_tokens"] if token["special"]}
            content["added_tokens"] = [t for t in content["added_tokens"] if not t["special"]]
            pieces = content["model"]["vocab"]
            for number, (piece, score) in enumerate(pieces):
                if piece in special and number != content["model"]["unk_id"]:
                    pieces[number] = [f"\x00{number}", score]
        backend = library.Tokenizer.from_str(json.dumps(content))
        backend.encode_special_tokens = True
        return backend

    @functools.cached_property
    def _reserved(self) -> np.ndarray:
        reserved = np.zeros(self.vocabulary.size, bool)
        reserved[[i for i in self.vocabulary.special_ids if i != self.vocabulary.unk]] = True
        return reserved


def load(
    name: Path | str,
    lowercase: bool | None = None,
    strip_accents: bool | None = None,
    *,
    sentinels: int = 0,
) -> Tokenizer:
    """Loads a tokenizer from a file, a folder or the Hugging Face hub.

    A WordPiece `vocab.txt` becomes BERT's tokenizer, with these options (`lowercase` None: true;
    `strip_accents` None: as `lowercase`). A SentencePiece `.model` cuts text as SentencePiece does;
    the options come before its own normaliser (`lowercase` None: false), as ALBERT's do. Everything
    else carries its own normaliser. A folder is read from tokenizer.json, else from vocab.txt, else
    from vocab.json and merges.txt (byte-level BPE), else, where it says whose tokenizer it is, by
    Transformers, else from a `.model` file; a hub name by Transformers. `sentinels` tokens
    <extra_id_0>, ... are added behind those of a tokenizer that has none, as T5's are.

    Raises:
      UserError: nothing to load, a file that is no tokenizer, options that do not apply.
    """
    loaded = _load(Path(name), str(name), lowercase, strip_accents)
    if not sentinels:
        return loaded
    if loaded.vocabulary.sentinels:
        count = len(loaded.vocabulary.sentinels)
        raise UserError(f"tokenizer {name} has {count} sentinels already: leave --sentinels out")
    backend = library.Tokenizer.from_str(loaded.backend.to_str())
    add_sentinels(backend, sentinels)
    return Tokenizer(backend, loaded.roles, loaded.settings)


def _load(path: Path, name: str, lowercase: bool | None, strip_accents: bool | None) -> Tokenizer:
    if path.is_file() and path.suffix == ".txt":
        return _load_wordpiece(path, True if lowercase is None else lowercase, strip_accents)
    if path.is_dir() and not (path / TOKENIZER_FILE).exists() and (path / "vocab.txt").exists():
        settings = _read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).exists() else {}
        if lowercase is None:
            lowercase = bool(settings.get("do_lower_case", True))
        if strip_accents is None:
            strip_accents = settings.get("strip_accents")
        return _load_wordpiece(path / "vocab.txt", lowercase, strip_accents)
    pieces = _sentencepiece_file(path)
    if pieces is not None:
        normalization = Normalization(None, bool(lowercase), strip_accents)
        return Tokenizer(*backend_of(read_model(pieces), normalization))
    if lowercase is not None or strip_accents is not None:
        raise UserError(
            "lower-casing and accent options apply to a WordPiece vocab.txt or a SentencePiece "
            f".model only; {name} has its own normaliser: leave them out"
        )
    if path.is_file() and path.suffix == ".json":
        return _load_json(path)
    if path.is_dir() and (path / TOKENIZER_FILE).exists():
        return _load_json(path / TOKENIZER_FILE)
    if (path / "vocab.json").exists() and (path / "merges.txt").exists():
        return _load_byte_bpe(path)
    if path.suffix in (".txt", ".json", ".model") or path.is_absolute() and not path.exists():
        raise UserError(f"there is no tokenizer {name}: no such file or folder")
    return _load_transformers(name)


def _sentencepiece_file(path: Path) -> Path | None:
    """The `.model` file that this path is, or that stands in a folder with nothing to say more."""
    if path.is_file() and path.suffix == ".model":
        return path
    telling = (TOKENIZER_FILE, CONFIG_FILE, "config.json", "vocab.json")
    if not path.is_dir() or any((path / name).exists() for name in telling):
        return None
    found = sorted(path.glob("*.model"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"the folder {path} holds several tokenizers: name one of {names}")
    return found[0] if found else None


def _load_wordpiece(path: Path, lowercase: bool, strip_accents: bool | None) -> Tokenizer:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): is it a vocabulary?") from None
    if lines and not lines[-1]:
        lines.pop()
    vocabulary = {line.rstrip("\r"): number for number, line in enumerate(lines)}
    if not any(name in vocabulary for name in USUAL_NAMES["unk"]):
        raise UserError(
            f"{path} holds no [UNK] among its {len(lines)} lines: a WordPiece vocabulary has one "
            "token a line and needs it"
        )
    backend = wordpiece_backend(vocabulary, Normalization(None, lowercase, strip_accents))
    settings = {"do_lower_case": lowercase, "strip_accents": strip_accents}
    return Tokenizer(backend, roles_by_name(vocabulary), settings)


def _load_byte_bpe(folder: Path) -> Tokenizer:
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises a bare Exception for anything it cannot read
        raise UserError(f"vocab.json and merges.txt in {folder} do not fit: {error}") from error
    backend = byte_bpe_backend(model, add_prefix_space=False)
    special = sorted(set(roles_by_name(backend.get_vocab()).values()))
    backend.add_special_tokens([special_token(token) for token in special])
    return Tokenizer(backend, frame_like_roberta(backend, add_prefix_space=False))


def _load_json(path: Path) -> Tokenizer:
    try:
        backend = library.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises a bare Exception for anything it cannot read
        raise UserError(f"{path} is no tokenizer that can be read: {error}") from error
    config_path = path.with_name(CONFIG_FILE)
    config = _read_json(config_path) if config_path.exists() else {}
    map_path = path.with_name(MAP_FILE)
    stated = {**(_read_json(map_path) if map_path.exists() else {}), **config}
    named = {
        role: value if isinstance(value, str) else value["content"]
        for role in Vocabulary.TOKENS
        if (value := stated.get(f"{role}_token"))
    }
    if not named:
        named = roles_by_name(backend.get_vocab(with_added_tokens=True))
    kept = ("do_lower_case", "strip_accents", "model_max_length", "model_input_names")
    return Tokenizer(backend, named, {key: config[key] for key in kept if key in config})


def _load_transformers(name: str) -> Tokenizer:
    # Transformers takes seconds to import: only what no file here answers asks it.
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name, use_fast=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"no tokenizer {name!r}: it is neither a vocab.txt, nor a tokenizer.json, nor a folder "
            f"or hub name that Transformers can load ({reason})"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"tokenizer {name!r} has no fast version, which encoding a corpus needs")
    roles = {
        role: str(token)
        for role in Vocabulary.TOKENS
        if (token := getattr(loaded, f"{role}_token", None)) is not None
    }
    return Tokenizer(backend, roles)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error


def _rebuild(text: str, roles: dict[str, str], settings: dict[str, Any]) -> Tokenizer:
    return Tokenizer(library.Tokenizer.from_str(text), roles, settings)
