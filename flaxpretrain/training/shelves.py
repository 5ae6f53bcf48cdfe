"""How checkpoints are finished, set aside and removed: by renaming, or by marks in a bucket.

On a disk, a folder `<step>` gets its name when it is complete. Objects in a bucket cannot be
renamed: there Orbax writes a mark into the folder when all else is in it, and what has no mark was
never finished. A damaged checkpoint gets a mark of its own.
"""

from pathlib import Path

from etils import epath
from etils.epath import backend

from flaxpretrain.locations import is_remote

UNFINISHED = ".orbax-checkpoint-tmp"
DELETING = ".deleting"
DAMAGED = ".damaged"

COMMITTED_MARK = "commit_success.txt"
"""Reference: COMMIT_SUCCESS_FILE of orbax/checkpoint/_src/path/atomicity_types.py."""

DAMAGED_MARK = "damaged.txt"


class Shelf:
    """The checkpoint folders on a disk."""

    def __init__(self, folder: epath.Path) -> None:
        """`folder` need not be there."""
        self.folder = folder

    def path(self, step: int) -> epath.Path:
        """The folder of a checkpoint."""
        return self.folder / str(step)

    def steps(self) -> list[int]:
        """The steps of complete checkpoints, in any order."""
        if not self.folder.exists():
            return []
        return [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]

    def tidy(self) -> None:
        """Removes what nobody can be writing any more: saves and removals that were killed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in list(self.folder.iterdir()):
            if UNFINISHED in path.name or path.name.endswith(DELETING):
                path.rmtree()

    def clear(self, step: int) -> None:
        """Makes room for a checkpoint that is about to be saved: nothing to do."""

    def set_aside(self, step: int, reason: str) -> str | None:
        """Keeps a damaged checkpoint out of the way; says how, if that had to be done."""
        target = self.folder / f"{step}{DAMAGED}"
        if not self.path(step).exists() or target.exists():
            return None
        self.path(step).rename(target)
        return f"moved the damaged checkpoint {self.path(step)} to {target.name}"

    def delete(self, step: int) -> None:
        """Removes a checkpoint; renamed first, for a half-deleted one must not look whole."""
        aside = self.folder / f"{step}{DELETING}"
        self.path(step).rename(aside)
        aside.rmtree()

    def write(self, path: epath.Path, text: str) -> None:
        """Writes a file so that no reader sees half of it."""
        aside = path.parent / (path.name + ".new")
        aside.write_text(text)
        aside.rename(path)


class BucketShelf(Shelf):
    """The checkpoint folders in a bucket."""

    def steps(self) -> list[int]:
        """The steps of checkpoints with Orbax's mark and without that of damage."""
        found = self._marks()
        return [s for s, m in found.items() if COMMITTED_MARK in m and DAMAGED_MARK not in m]

    def _marks(self) -> dict[int, set[str]]:
        """The names of the objects beside the arrays of each checkpoint, complete or not."""
        # Arrays go past the list of what there is, which epath's file system keeps.
        backend.fsspec_backend.fs(self.folder).invalidate_cache()
        if not self.folder.exists():
            return {}
        paths = [path for path in self.folder.iterdir() if path.name.isdigit()]
        return {int(path.name): {inside.name for inside in path.iterdir()} for path in paths}

    def tidy(self) -> None:
        """Removes saves and removals that were killed: what has no mark."""
        for step, marks in self._marks().items():
            if COMMITTED_MARK not in marks:
                self.path(step).rmtree()

    def clear(self, step: int) -> None:
        """Removes a damaged checkpoint of the same step."""
        if self.path(step).exists():
            self.path(step).rmtree()

    def set_aside(self, step: int, reason: str) -> str | None:
        """Marks a damaged checkpoint."""
        if step not in self.steps():
            return None
        (self.path(step) / DAMAGED_MARK).write_text(reason)
        return f"marked the checkpoint {self.path(step)} as damaged"

    def delete(self, step: int) -> None:
        """Removes a checkpoint, its mark first."""
        (self.path(step) / COMMITTED_MARK).unlink()
        self.path(step).rmtree()

    def write(self, path: epath.Path, text: str) -> None:
        """Writes an object, which is there whole or not at all."""
        path.write_text(text)


def open_shelf(location: Path | str) -> Shelf:
    """The shelf of a folder or of gs://BUCKET/FOLDER."""
    if is_remote(location):
        return BucketShelf(epath.Path(str(location)))
    return Shelf(epath.Path(Path(location).absolute()))
