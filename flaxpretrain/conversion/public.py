"""What may be published: text without private paths, tokens and user names."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}|\b(?:sk|ghp|gho|glpat)[-_][A-Za-z0-9_-]{16,}")

# Folders before the last part of a path that is absolute, under a home, above the working folder,
# or in a bucket; addresses of the web stay whole.
_FOLDERS = re.compile(
    r"""(?<![\w./:~-])
    (?: (?:gs|s3|file|hdfs)://(?:[^\s"',=:]*/)?
      | (?:~[\w.-]*|\.\.)?/(?:[^\s"',=:]*/)?
      | \.\.(?=$|[\s"'])
    )""",
    re.VERBOSE,
)


def public(text: str) -> str:
    """`text` with only the last part of private paths, and without anything like a token."""
    return _FOLDERS.sub("", _TOKEN.sub("***", text))


def public_command(command: str) -> str:
    """A command line that can be shown; quoting survives where it is needed."""
    try:
        words = shlex.split(command)
    except ValueError:
        return public(command)
    return shlex.join(_public_word(word) for word in words)


def _public_word(word: str) -> str:
    """Each side of every `=`, as in `--set=data.folder=PATH`."""
    return "=".join(public_path(part) for part in word.split("="))


def public_path(text: str) -> str:
    """A text that may be one path with spaces in it: its last part where it is private."""
    private = re.match(r"(/|~|\.\./|(gs|s3|file|hdfs)://)", text)
    shown = text.rstrip("/").rsplit("/", 1)[-1] if private else text
    return _TOKEN.sub("***", shown)


def public_values(data: Any) -> Any:
    """JSON data with every text made public."""
    if isinstance(data, Mapping):
        return {key: public_values(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [public_values(value) for value in data]
    return public_path(data) if isinstance(data, str) else data
