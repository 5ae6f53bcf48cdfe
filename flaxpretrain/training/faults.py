"""What lies behind an error that a library has wrapped."""

import re

from flaxpretrain.locations import from_store

_STORAGE_SAYS = re.compile(
    r"No space left|File too large|[Qq]uota|Permission denied|Read-only file system|"
    r"Input/output error|RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED"
)


def storage_fault(error: BaseException | None) -> str | None:
    """What a disk or bucket said, in one line, where it is the cause of an error."""
    first = error
    while error is not None:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        said = next((line for line in lines if _STORAGE_SAYS.search(line)), None)
        if said is not None or isinstance(error, OSError):
            return (said or lines[0])[:300]
        error = error.__cause__ or error.__context__
    return root_cause(first) if first is not None and from_store(first) else None


def root_cause(error: BaseException) -> str:
    """The first line of the error that the others came from."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
