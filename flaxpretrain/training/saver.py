"""Saves a session's state with what it takes to go on from it."""

import flaxpretrain
from flaxpretrain.config import render
from flaxpretrain.training.checkpoints import Checkpoints
from flaxpretrain.training.goodput import Ledger
from flaxpretrain.training.resume import FORMAT
from flaxpretrain.training.rewind import SpikeDetector
from flaxpretrain.training.session import Session
from flaxpretrain.training.workdirs import Workdir


class Saver:
    """Saves the session's state when the policy says so."""

    def __init__(
        self,
        session: Session,
        checkpoints: Checkpoints,
        identity: str,
        ledger: Ledger,
        detector: SpikeDetector | None,
        workdir: Workdir,
    ) -> None:
        """`identity` is that of the dataset."""
        self._workdir = workdir
        self._ledger, self._detector = ledger, detector
        self._session, self._checkpoints, self._identity = session, checkpoints, identity
        self._saved = session.step if checkpoints.latest() is not None else -1
        self._config = render(session.run)

    def due(self) -> bool:
        """Whether the state of this step is to be saved."""
        return self._checkpoints.due(self._session.step)

    def save(self, force: bool = False) -> None:
        """Starts saving; a step that is already saved is not saved again."""
        session = self._session
        if session.step == self._saved:
            return
        metadata = {
            "format": FORMAT,
            "step": session.step,
            "run": self._config,
            "phase_steps": [phase.steps for phase in session.phases],
            "dataset": self._identity,
            "tokenizer": session.dataset.fingerprint,
            "code_version": flaxpretrain.__version__,
            "figures": session.figures,
            "mixing": session.history,
            "rewinds": session.rewinds,
            "spikes": self._detector.state() if self._detector else {},
            "wall_seconds": self._ledger.seconds(),
        }
        self._checkpoints.save(
            session.step, session.state, metadata, metrics=session.figures, force=force
        )
        self._workdir.copy()
        self._saved = session.step
