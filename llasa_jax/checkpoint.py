"""A run's checkpoints: weights, optimizer and the place in the data, written by Orbax while training goes on.

Orbax writes a checkpoint under a temporary name and renames it when it is whole, so a crash never leaves half of one.
"""

import warnings
from pathlib import Path

import grain
import jax
import orbax.checkpoint as ocp

from llasa_jax.model_folder import CHECKPOINTS, PARAMS


class Checkpoints:
    """The `checkpoints/` of a run's folder, of which the newest `keep` are kept."""

    def __init__(self, run: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager((run / CHECKPOINTS).absolute(), options=options)

    def save(self, step: int, params, opt_state, data: grain.DatasetIterator) -> None:
        """Begins to write the state after `step` steps; returns once it is copied off the devices. Does nothing if it is there."""
        if step in self._manager.all_steps():
            return
        items = {
            PARAMS: ocp.args.StandardSave(params),
            "optimizer": ocp.args.StandardSave(opt_state),
            "data": grain.checkpoint.CheckpointSave(data),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, params, opt_state, data: grain.DatasetIterator):
        """The newest readable checkpoint as (step, params, opt_state), with `data` moved to its place; None if there is none.

        `params` and `opt_state` are trees of `ShapeDtypeStruct` with shardings: the mesh may differ from the one that saved. A damaged
        checkpoint is passed over with a warning, and removed so that it can be written anew.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            items = {
                PARAMS: ocp.args.StandardRestore(params),
                "optimizer": ocp.args.StandardRestore(opt_state),
                "data": grain.checkpoint.CheckpointRestore(data),
            }
            try:
                restored = self._manager.restore(step, args=ocp.args.Composite(**items))
                jax.block_until_ready((restored[PARAMS], restored["optimizer"]))
            except Exception as error:  # noqa: BLE001 Orbax, TensorStore and JSON each raise their own kinds
                warnings.warn(
                    f"the checkpoint of step {step} is damaged and is passed over for the one before: {str(error)[:200]}", stacklevel=2
                )
                self._manager.delete(step)
                continue
            return step, restored[PARAMS], restored["optimizer"]
        return None

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
