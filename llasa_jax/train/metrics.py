"""Where a run's numbers go: `metrics.jsonl` with a line a step, TensorBoard's event files, W&B if
asked.
"""

import json
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np

from llasa_jax.errors import UserError
from llasa_jax.runtime.writing import write_whole
from llasa_jax.train.settings import LogSettings


class Metrics:
    """Writes numbers by step into a run's folder. Lines after `last_step`, left by a run that was
    cut off, are removed first.

    `name` is the run's, in W&B; by default that of its folder. `before` is the last line that tells
    where the time went, `reached` the last step of the run that was cut off. What cannot be written
    is reported once, and training goes on: a checkpoint is worth more than a line.
    """

    def __init__(self, run: Path, settings: LogSettings, last_step: int, name: str = ""):
        self._file = self._tensorboard = self._wandb = None
        self._complained = False
        self.before: dict[str, float] = {}
        self.reached = 0
        if jax.process_index():
            return  # the first host writes for all
        path = run / "metrics.jsonl"
        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= last_step]
        steps = [_step_of(line) for line in lines]
        self.reached = int(max((step for step in steps if step < float("inf")), default=0))
        timed = [line for line in kept if '"goodput"' in line]
        self.before = json.loads(timed[-1]) if timed else {}
        write_whole(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("ab", buffering=0)
        if settings.tensorboard:
            self._tensorboard = _TensorBoard(run / "tensorboard", last_step + 1)
        if settings.wandb:
            try:
                import wandb
            except ImportError:
                raise UserError(
                    "log.wandb is set but wandb is not installed; run `pip install"
                    " llasa-jax[wandb]` or unset it"
                ) from None
            self._wandb = wandb.init(
                project=settings.wandb,
                dir=str(run),
                id=name or run.absolute().name,
                resume="allow",
            )

    def write(self, step: int, numbers: dict[str, float]) -> None:
        if self._file:
            with self._forgiving():
                self._file.write((json.dumps({"step": step, **numbers}) + "\n").encode())
        if self._tensorboard:
            with self._forgiving():
                self._tensorboard.scalars(step, numbers)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def audio(self, step: int, name: str, wave: np.ndarray, rate: int) -> None:
        """Adds speech, float32 (samples,) at `rate` samples a second, to TensorBoard and W&B."""
        if self._tensorboard:
            with self._forgiving():
                self._tensorboard.audio(step, name, wave, rate)
        if self._wandb:
            import wandb

            self._wandb.log({name: wandb.Audio(wave, sample_rate=rate)}, step=step)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._file:
            with self._forgiving():
                self._file.close()
        if self._tensorboard:
            with self._forgiving():
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    @contextmanager
    def _forgiving(self):
        try:
            yield
        except OSError as error:
            if not self._complained:
                warnings.warn(
                    f"the run's numbers cannot be written ({error}); training goes on without",
                    stacklevel=4,
                )
            self._complained = True


class _TensorBoard:
    """An event file, written at once: tensorboardX's `SummaryWriter` has a thread, and blocks for
    ever once a full disk has ended it.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(exist_ok=True)
        self._summary, self._event = summary, Event
        self._file = EventsWriter(str(folder / "events"))
        # Takes back what a run that was cut off wrote after its last checkpoint.
        self._file.write_event(
            Event(
                wall_time=time.time(),
                step=first_step,
                session_log=SessionLog(status=SessionLog.START),
            )
        )

    def scalars(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._write(step, self._summary.scalar(name, value))

    def audio(self, step: int, name: str, wave: np.ndarray, rate: int) -> None:
        self._write(step, self._summary.audio(name, wave.clip(-1, 1), rate))

    def _write(self, step: int, summary) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
