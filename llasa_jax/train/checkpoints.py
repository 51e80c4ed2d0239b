"""A run's checkpoints: weights, optimizer and the place in the data, written by Orbax while
training goes on.

Orbax writes a checkpoint under a temporary name and renames it when it is whole, so a crash never
leaves half of one. There is no random state to keep: training draws nothing at random but the order
of the data, and that is a seed and the place in it.
"""

import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import grain
import jax
import orbax.checkpoint as ocp

from llasa_jax.convert.model_folder import (
    ABOUT,
    CHECKPOINTS,
    PARAMS,
    check_fingerprint,
    chunking,
    read_about,
    saved_steps,
)
from llasa_jax.errors import UserError
from llasa_jax.runtime import hosts
from llasa_jax.runtime.files import is_full

OPTIMIZER, DATA = "optimizer", "data"
DAMAGED = "damaged"


class Checkpoints:
    """The `checkpoints/` of a run's folder: the newest `keep`, and besides them the `keep_best` of
    the lowest validation loss.

    `clips` is the number of the training data's clips: the place in the data means something only
    for the same data, on the same number of hosts, so both are kept with it. `base` is the folder
    and the fingerprint of the model that a LoRA run's checkpoints belong to. A context, which ends
    when everything is on disk; what cannot be written raises UserError.
    """

    def __init__(
        self,
        run: Path,
        keep: int,
        keep_best: int = 0,
        clips: int = 0,
        base: tuple[Path, str] | None = None,
    ):
        self._folder, self._keep, self._keep_best = (run / CHECKPOINTS).absolute(), keep, keep_best
        self._place = {"hosts": jax.process_count(), "clips": clips}
        self._run, self._base = run, base
        self._losses = {
            step: loss
            for step in saved_steps(run)
            if (loss := read_about(run, step).get("validation_loss")) is not None
        }
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self, create=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(
        self,
        step: int,
        params,
        opt_state,
        data: grain.DatasetIterator,
        validation_loss: float | None = None,
    ) -> None:
        """Begins to write the state after `step` steps; returns once it is copied off the devices.
        Does nothing if it is there.

        An earlier checkpoint is removed only when this one is whole.
        """
        if step in self._manager.all_steps():
            return
        if validation_loss is not None:
            self._losses[step] = validation_loss
        base = {"base": str(self._base[0]), "fingerprint": self._base[1]} if self._base else {}
        items = {
            PARAMS: ocp.args.StandardSave(params, save_args=chunking(params)),
            OPTIMIZER: ocp.args.StandardSave(opt_state),
            DATA: grain.checkpoint.CheckpointSave(data),
            ABOUT: ocp.args.JsonSave(self._place | base | {"validation_loss": validation_loss}),
        }
        with self._explained():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def check(self) -> None:
        """Raises UserError if what is being written in the background has failed; otherwise that
        would be told with the next save.
        """
        with self._explained():
            if not self._manager.is_saving_in_progress():
                # its `check_for_errors` does not see what ended the last save
                self._manager.wait_until_finished()

    def best(self) -> tuple[int, float] | None:
        """The step with the lowest validation loss among the checkpoints, and that loss."""
        kept = [
            (loss, step) for step, loss in self._losses.items() if step in self._manager.all_steps()
        ]
        return min(kept)[::-1] if kept else None

    def restore(self, params, opt_state, data: grain.DatasetIterator):
        """The newest readable checkpoint as (step, params, opt_state), with `data` moved to its
        place; None if there is none.

        `params` and `opt_state` are trees of `ShapeDtypeStruct` with shardings: the mesh may differ
        from the one that saved. A damaged checkpoint is passed over with a warning, and moved aside
        so that it can be written anew. UserError where none can be read, and where the data or the
        number of hosts are others.
        """
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            self._check_place(step)
            items = {
                PARAMS: ocp.args.StandardRestore(params),
                OPTIMIZER: ocp.args.StandardRestore(opt_state),
                DATA: grain.checkpoint.CheckpointRestore(data),
                ABOUT: ocp.args.JsonRestore(),
            }
            try:
                restored = self._manager.restore(step, args=ocp.args.Composite(**items))
                jax.block_until_ready((restored[PARAMS], restored[OPTIMIZER]))
                failure = ""
            except Exception as error:  # noqa: BLE001 Orbax, TensorStore and JSON each raise their own kinds
                failure = " ".join(str(error).split())[:200]
            if hosts.largest(bool(failure)):
                damaged[step] = failure or "another host cannot read it"
                continue
            self._move_aside(damaged)
            return step, restored[PARAMS], restored[OPTIMIZER]
        if damaged:
            raise UserError(
                f"none of the checkpoints in {self._folder} can be read (step {max(damaged)}:"
                f" {damaged[max(damaged)]}); mend or delete them, or choose another out folder"
            )
        return None

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Orbax's question which checkpoints to keep; they come in the order of their steps."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = sorted((step for step in steps if step in self._losses), key=self._losses.get)[
            : self._keep_best
        ]
        return [step in (*steps[-self._keep :], *best) for step in steps]

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            with self._explained():
                self._manager.close()
        except UserError:
            # The first error is the cause, and the one to tell.
            if kind is None:
                raise

    @contextmanager
    def _explained(self):
        try:
            yield
        except Exception as error:
            reason = "the disk is full" if is_full(error) else " ".join(str(error).split())[:200]
            saved = saved_steps(self._folder.parent)
            since = (
                f"goes on after step {saved[-1]}, the last whole checkpoint"
                if saved
                else "begins anew, for none is whole yet"
            )
            raise UserError(
                f"a checkpoint could not be written to {self._folder} ({reason}); mend that and"
                f" give the same command again, which {since}"
            ) from error

    def _check_place(self, step: int) -> None:
        if self._base:
            check_fingerprint(self._run, step, *self._base)
        about = read_about(self._run, step)
        for name, now in self._place.items():
            before = about.get(name, now)
            if before != now:
                what = {
                    "hosts": f"on {before} hosts, not {now}",
                    "clips": f"from {before} training clips, not {now}",
                }[name]
                raise UserError(
                    f"the run in {self._folder.parent} was made {what}, so its place in the data"
                    " has no meaning now; go on as it was, or choose another out folder"
                )

    def _move_aside(self, damaged: dict[int, str]) -> None:
        for step, failure in damaged.items():
            if jax.process_index() == 0:
                there = self._folder.parent / DAMAGED / str(step)
                warnings.warn(
                    f"the checkpoint of step {step} is damaged and is passed over for the one"
                    f" before; it is now in {there}: {failure}",
                    stacklevel=3,
                )
                shutil.rmtree(there, ignore_errors=True)
                there.parent.mkdir(exist_ok=True)
                (self._folder / str(step)).rename(there)
            self._losses.pop(step, None)
        if damaged:
            hosts.largest(0)  # nobody looks before all is moved
            self._manager.reload()
