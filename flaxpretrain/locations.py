"""Where things lie: folders of this machine, and URLs such as gs://bucket/folder."""

from pathlib import Path

Location = Path | str
"""A folder of this machine as a Path, or a URL as text: a Path would shorten its `//`."""


def is_remote(location: Location | None) -> bool:
    """Whether this is a URL."""
    return "://" in str(location or "")


def located(text: Location) -> Location:
    """A URL as it is, without a slash at its end; a path with `~` written out."""
    if is_remote(text):
        return str(text).rstrip("/")
    return Path(text).expanduser()


def joined(location: Location, name: str) -> Location:
    """Something in a folder, or beside it where `name` is absolute or a URL itself."""
    if is_remote(name) or not is_remote(location):
        return located(name) if is_remote(name) else Path(location) / Path(name).expanduser()
    return located(name) if Path(name).is_absolute() else f"{located(location)}/{name}"
