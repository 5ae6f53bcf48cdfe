"""Values of a recipe that hand its model on: export after the last step, pushes to the hub."""

import dataclasses
import shlex
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from flaxpretrain.config import render
from flaxpretrain.conversion import hub
from flaxpretrain.conversion.card import Facts
from flaxpretrain.conversion.export import export, to_host
from flaxpretrain.conversion.licences import require_licence
from flaxpretrain.conversion.sources import dataset_facts, read_origin, run_facts
from flaxpretrain.errors import UserError
from flaxpretrain.training.session import Session


def session_facts(session: Session, licence: str | None, name: str | None = None) -> Facts:
    """What the model card of a session's present state tells."""
    return Facts(
        name=name or session.run.name,
        run=render(session.run),
        dataset=dataset_facts(session.run, session.workdir),
        environment=run_facts(session.workdir),
        figures=dict(session.figures),
        step=session.step,
        command=session.command,
        base_model=read_origin(session.workdir).hub_id,
        licence=licence,
    )


def session_part(session: Session, part: str | None) -> tuple[Any, PyTree]:
    """Configuration and parameters, copied to the host, of a part of the session's model.

    All processes of a run must call it.

    Raises:
        UserError: no such part, or several and no name.
    """
    parts = session.run.objective.parts(session.run.model, to_host(session.state.params))
    if part is None and len(parts) == 1:
        return next(iter(parts.values()))
    if part is None or part not in parts:
        raise UserError(f"part: expected one of {', '.join(parts)}; got {part!r}")
    return parts[part]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Writes the model as a Hugging Face folder in the workdir: for `Run.finish`.

    folder: inside the workdir; replaced if it is there.
    part: which of the objective's networks, where it has several.
    push_to_hub: a hub id to push the folder to as well.
    private: whether a repository that is made for it is private.
    license: of the model, as the hub names it; None takes that of the corpus.
    compare: whether to compare outputs with Transformers where torch is installed.
    """

    folder: str = "hf"
    part: str | None = None
    push_to_hub: str | None = None
    private: bool = True
    license: str | None = None
    compare: bool = True

    def __post_init__(self) -> None:
        """Raises UserError on a folder outside of the workdir or an unknown licence."""
        if Path(self.folder).name != self.folder or self.folder in ("", ".", ".."):
            raise UserError(f"Export.folder: expected a name in the workdir; got {self.folder!r}")
        if self.license is not None:
            require_licence(self.license)

    def run(self, session: Session) -> None:
        """Exports the present state; a failed push is told, the export stays."""
        config, params = session_part(session, self.part)
        if jax.process_index() != 0:
            return
        folder = session.workdir / self.folder
        exported = export(
            config,
            params,
            session.dataset.tokenizer_folder,
            folder,
            session_facts(session, self.license),
            overwrite=True,
            compare=self.compare,
        )
        for line in exported.lines():
            session.say(line)
        if self.push_to_hub is not None:
            session.say(f"pushing to {self.push_to_hub}")
            try:
                address = hub.push(
                    folder,
                    self.push_to_hub,
                    private=self.private,
                    message=f"Step {session.step}",
                )
            except UserError as error:
                session.say(
                    f"{error}; the export is whole, push it with: hf upload "
                    f"{shlex.quote(self.push_to_hub)} {shlex.quote(str(folder))}"
                )
            else:
                session.say(f"pushed to {address}")


class _Background:
    """At most one push at a time, on a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def busy(self) -> bool:
        """Whether a push is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        """Begins a push; a process that ends meanwhile does not wait for it."""
        self._thread = threading.Thread(target=work, name="push-to-hub", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the push under way has ended."""
        if self._thread is not None:
            self._thread.join()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushToHub:
    """Pushes the model to the hub every so often: for `Run.evaluations`, beside the figures.

    Training waits only for the copy of the parameters. While a push is under way the next one is
    left out; whatever fails is told in a line and never stops training. After the last step the
    push is waited for.

    repository: the hub id, `owner/name`.
    part, private, license: as in `Export`.
    """

    repository: str
    every_steps: int | None = None
    part: str | None = None
    private: bool = True
    license: str | None = None
    name: str = "hub"
    _background: _Background = dataclasses.field(
        default_factory=_Background, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Raises UserError on what is no hub id, or an unknown licence."""
        if not hub.is_hub_id(self.repository) or "@" in self.repository:
            raise UserError(f"PushToHub.repository: expected owner/name; got {self.repository!r}")
        if self.license is not None:
            require_licence(self.license)

    def run(self, session: Session) -> dict[str, float]:
        """Starts a push of the present state; there are no figures."""
        last = session.step >= session.total_steps
        if last:
            self._background.wait()
        # Other processes must take part in the copy even when this one would leave it out.
        skip = self._background.busy()
        if jax.process_count() == 1 and skip:
            session.say(f"step {session.step}: the push before is still under way, left out")
            return {}
        config, params = session_part(session, self.part)
        if jax.process_index() != 0 or skip:
            return {}
        facts = session_facts(session, self.license, self.repository.rpartition("/")[2])
        tokenizer = session.dataset.tokenizer_folder
        folder = session.workdir / f"{self.name}-push"
        step, say = session.step, session.say

        def work() -> None:
            # Nobody waits for this thread: whatever goes wrong in it must be told here.
            try:
                export(config, params, tokenizer, folder, facts, overwrite=True, compare=False)
                address = hub.push(
                    folder, self.repository, private=self.private, message=f"Step {step}"
                )
            except Exception as error:
                say(f"step {step}: push failed, training goes on: {error}")
            else:
                say(f"step {step}: pushed to {address}")

        self._background.start(work)
        if last:
            self._background.wait()
        return {}
