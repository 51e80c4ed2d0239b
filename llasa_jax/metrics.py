"""Where a run's numbers go: `metrics.jsonl` with a line a step, TensorBoard's event files, W&B if asked."""

import json
from pathlib import Path

from llasa_jax.errors import UserError
from llasa_jax.settings import LogSettings


class Metrics:
    """Writes numbers by step into a run's folder. Lines after `last_step`, left by a run that was cut off, are removed first."""

    def __init__(self, run: Path, settings: LogSettings, last_step: int):
        path = run / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= last_step] if path.is_file() else []
        rewritten = path.with_suffix(".tmp")
        rewritten.write_text("".join(f"{line}\n" for line in kept))
        rewritten.replace(path)
        self._file = path.open("a", buffering=1)
        self._tensorboard = self._wandb = None
        if settings.tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=last_step + 1)
        if settings.wandb:
            try:
                import wandb
            except ImportError:
                raise UserError("log.wandb is set but wandb is not installed; run `pip install llasa-jax[wandb]` or unset it") from None
            self._wandb = wandb.init(project=settings.wandb, dir=str(run), id=run.absolute().name, resume="allow")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        if self._tensorboard:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
