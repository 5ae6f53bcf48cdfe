"""Where a run's output goes: a folder of this machine, or a bucket behind one.

Objects in a bucket can be neither appended to nor renamed. So a run whose workdir is gs://bucket/run
writes its logs into a folder of this machine, from which they are copied at each checkpoint, whole;
checkpoints go to the bucket itself. At the start the folder is made what the bucket says.
"""

import contextlib
import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from flaxpretrain.errors import UserError
from flaxpretrain.locations import Location, is_remote, located

CHECKPOINTS = "checkpoints"
NOT_COPIED = (CHECKPOINTS, "dataset", "compile_cache")
"""What lies in a workdir and is in the bucket already, or made anew on every machine."""

LOCAL_FOLDER = Path(".cache") / "flaxpretrain" / "workdirs"
"""In the user's home: the folders of runs whose workdirs are in a bucket."""


class Workdir:
    """A workdir on this machine."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made if it is not there.

        Raises:
            UserError: it cannot be written.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".writable-{jax.process_index()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"--workdir {folder} cannot be written ({error.strerror}): choose another folder"
            ) from error

    @property
    def checkpoints(self) -> Location:
        """Where checkpoints go."""
        return self.folder / CHECKPOINTS

    def copy(self, wait: bool = False) -> None:
        """Copies logs to where they are kept: nothing to do."""


class BucketWorkdir(Workdir):
    """A workdir in a bucket, with its folder on this machine."""

    def __init__(self, url: str, say: Callable[[str], None]) -> None:
        """Makes the local folder what the bucket says; `say` takes warnings.

        Raises:
            UserError: the bucket refuses, or is of a kind that checkpoints cannot be written to.
        """
        import fsspec

        if not url.startswith("gs://"):
            raise UserError(f"--workdir {url}: expected a folder or gs://BUCKET/FOLDER")
        super().__init__(local_folder(url))
        self._url, self._say = url, say
        self._copied: dict[str, tuple[int, int]] = {}
        self._thread: threading.Thread | None = None
        try:
            self._system, self._root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise UserError(f"--workdir {url} needs gcsfs: install flaxpretrain[cloud]") from error
        with self._refusals("cannot be written"):
            probe = f"{self._root}/.writable-{jax.process_index()}"
            self._system.pipe_file(probe, b"writable\n")
            self._system.rm_file(probe)
        with self._refusals("cannot be read"):
            self._fetch()

    @property
    def checkpoints(self) -> Location:
        """Where checkpoints go: the bucket itself."""
        return f"{self._url}/{CHECKPOINTS}"

    def copy(self, wait: bool = False) -> None:
        """Copies what is new in the folder, in the background unless `wait`.

        What fails is told, and tried again the next time; it stops no training.
        """
        if jax.process_index() != 0:
            return
        if self._thread is not None:
            self._thread.join()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()
        if wait:
            self._thread.join()

    def _send(self) -> None:
        try:
            for path in self._files():
                stat, name = path.stat(), path.relative_to(self.folder).as_posix()
                state = stat.st_size, stat.st_mtime_ns
                if self._copied.get(name) != state:
                    self._system.pipe_file(f"{self._root}/{name}", path.read_bytes())
                    self._copied[name] = state
        except Exception as error:  # a daemon's: stores have errors of many types
            self._say(f"warning: logs could not be copied to {self._url}: {_reason(error)}")

    def _files(self) -> Iterator[Path]:
        for path in sorted(self.folder.rglob("*")):
            parts = path.relative_to(self.folder).parts
            hidden = any(part.startswith(".") or part.endswith(".new") for part in parts)
            if path.is_file() and parts[0] not in NOT_COPIED and not hidden:
                yield path

    def _fetch(self) -> None:
        """Makes the local folder what the bucket says, but for what is made anew."""
        self._system.invalidate_cache()
        prefix = self._root + "/"
        names = [path.removeprefix(prefix) for path in self._system.find(self._root)]
        wanted = [name for name in names if name.split("/")[0] not in NOT_COPIED]
        for path in list(self.folder.iterdir()):
            if path.name not in NOT_COPIED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in wanted:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._system.cat_file(prefix + name))

    @contextlib.contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # stores have errors of many types
            raise UserError(
                f"--workdir {self._url} {what} ({_reason(error)}): look whether the bucket is "
                "there and this machine may use it"
            ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def local_folder(workdir: Location) -> Path:
    """A workdir's folder on this machine: itself, or that behind which a bucket stands."""
    if not is_remote(workdir):
        return Path(workdir)
    key = hashlib.sha256(str(located(workdir)).encode()).hexdigest()[:32]
    return Path.home() / LOCAL_FOLDER / f"{key}-{jax.process_index()}"


def open_workdir(workdir: Location, say: Callable[[str], None]) -> Workdir:
    """A workdir, made if it is not there; `say` takes warnings.

    Raises:
        UserError: it cannot be written.
    """
    if is_remote(workdir):
        return BucketWorkdir(str(located(workdir)), say)
    return Workdir(Path(workdir))


__all__ = ["BucketWorkdir", "Workdir", "local_folder", "open_workdir"]
