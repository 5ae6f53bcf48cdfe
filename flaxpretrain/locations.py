"""Where things lie: folders of this machine, and URLs such as gs://bucket/folder."""

import re
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


def given(text: str) -> Location:
    """What a command line gives: a path, or a URL as it is, a slash at its end included."""
    return text if is_remote(text) else Path(text)


def joined(location: Location, name: str) -> Location:
    """Something in a folder, or beside it where `name` is absolute or a URL itself."""
    if is_remote(name) or not is_remote(location):
        return located(name) if is_remote(name) else Path(location) / Path(name).expanduser()
    return located(name) if Path(name).is_absolute() else f"{located(location)}/{name}"


_STORE_PACKAGES = frozenset(
    {"aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs"}
)
_STORE_STATUS = re.compile(r"\b(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED)\b")
"""How TensorStore names what a store answered."""


def from_store(error: BaseException) -> bool:
    """Whether a disk, a store or the way to it is at fault, not this program.

    An object that is missing is no fault of the store.
    """
    found: BaseException | None = error
    while found is not None:
        packages = {kind.__module__.partition(".")[0] for kind in type(found).__mro__}
        if packages & _STORE_PACKAGES or _STORE_STATUS.search(str(found)):
            return True
        if isinstance(found, OSError) and not isinstance(found, FileNotFoundError):
            return True
        found = found.__cause__
    return False
