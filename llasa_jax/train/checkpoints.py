"""A run's checkpoints: weights, optimizer and the place in the data, written by Orbax while
training goes on.

Orbax writes a checkpoint under a temporary name and renames it when it is whole, so a crash never
leaves half of one. Beside each step, `about` keeps the checksum of every tensor (see
`llasa_jax.model.checksum`) and of the place in the data, so a flipped bit is found when the
checkpoint is read, on any mesh. There is no random state to keep: only the order of the data is
random, and that is a seed and the place in it.
"""

import json
import shutil
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from llasa_jax.convert.model_folder import (
    ABOUT,
    CHECKPOINTS,
    COMMIT,
    PARAMS,
    check_fingerprint,
    chunking,
    read_about,
    remote_steps,
    saved_steps,
)
from llasa_jax.errors import UserError
from llasa_jax.model.checksum import all_finite, checksums, compare
from llasa_jax.runtime import hosts, storage
from llasa_jax.runtime.faults import first_unreadable, is_passing
from llasa_jax.runtime.files import explain, is_full
from llasa_jax.runtime.library_path import library_path
from llasa_jax.runtime.storage import absolute, is_remote
from llasa_jax.train.orbax_on_s3 import let_orbax_use_s3
from llasa_jax.train.places import gathered_places

OPTIMIZER, DATA = "optimizer", "data"
STREAMS = "streams"  # in `about` how many there are, in `data` the place in each
ITEMS = {PARAMS, OPTIMIZER, DATA, ABOUT}
# What a folder of Orbax's has, some of it even while it is being removed.
CONTENTS = ITEMS | {"_CHECKPOINT_METADATA", COMMIT}
DAMAGED = "damaged"
# Seconds to wait before a checkpoint that could not be read is read again.
RETRIES = (1.0, 5.0, 20.0)

# How reading a checkpoint ended. The worst of all hosts counts.
READ, DAMAGE, PASSING = 0, 1, 2


class Checkpoints:
    """The `checkpoints/` of a run's folder: the newest `keep`, and the `keep_best` with the best
    number of the name `best_by`, which is the highest if `highest`.

    The place in the data means something only for the same data, cut into the same number of
    `streams`, so both are kept with it: `clips` is the number of training clips, `data` a
    fingerprint of them. The place is that of all streams; `here` are those that this host reads.
    `base` is the folder and the fingerprint of the model that a LoRA run's checkpoints belong to.
    A context, which ends when everything is on disk. Raises UserError on what cannot be written.
    """

    def __init__(
        self,
        run: Path,
        keep: int,
        keep_best: int = 0,
        clips: int = 0,
        base: tuple[Path, str] | None = None,
        data: str = "",
        streams: int = 1,
        here: Sequence[int] = (0,),
        best_by: str = "validation_loss",
        highest: bool = False,
    ):
        self._folder, self._keep, self._keep_best = absolute(run / CHECKPOINTS), keep, keep_best
        self._streams, self._here = streams, here
        self._data = {STREAMS: streams, "clips": clips} | ({"dataset": data} if data else {})
        self._run, self._base = run, base
        self._newest = 0  # the newest step that is known to be whole
        self._best_by, self._sign = best_by, -1 if highest else 1
        self._ranked = {
            step: value
            for step in saved_steps(run)
            if (value := self._about(step).get(best_by)) is not None
        }
        self._check_writable()
        if str(self._folder).startswith("s3://"):
            let_orbax_use_s3()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self, create=True, cleanup_tmp_directories=True
        )
        self._alias = library_path(self._folder)
        self._manager = ocp.CheckpointManager(self._alias.__enter__(), options=options)

    def save(
        self,
        step: int,
        params,
        opt_state,
        data: grain.DatasetIterator,
        numbers: Mapping[str, float] | None = None,
    ) -> None:
        """Begins to write the state after `step` steps; returns once it is copied off the devices.
        Does nothing if it is there already. `numbers` say how good it is: the validation loss and
        what an evaluation found.

        An earlier checkpoint is removed only when this one is whole. Raises UserError where it
        cannot be written, and where a weight is not finite: such a state is not worth keeping.
        """
        if step in self._manager.all_steps():
            return
        if not all_finite(params):
            raise UserError(
                f"the weights became infinite or nan by step {step}, which is not saved; lower"
                " optimizer.learning_rate or look at the data, and go on from the last checkpoint"
            )
        if not is_remote(self._folder):  # to ask a bucket again would make the step wait
            self._check_writable()
        numbers = numbers or {}
        if self._best_by in numbers:
            self._ranked[step] = numbers[self._best_by]
        base = {"base": str(self._base[0]), "fingerprint": self._base[1]} if self._base else {}
        places = gathered_places(data, self._here, self._streams)
        about: dict[str, Any] = self._data | base | {"validation_loss": None} | dict(numbers)
        about["checksums"] = {PARAMS: checksums(params), OPTIMIZER: checksums(opt_state)}
        about["checksums"][DATA] = [_crc(place) for place in places]
        items = {
            PARAMS: ocp.args.StandardSave(params, save_args=chunking(params)),
            OPTIMIZER: ocp.args.StandardSave(opt_state),
            DATA: ocp.args.JsonSave({STREAMS: places}),
            ABOUT: ocp.args.JsonSave(about | {"checksum": _crc(about)}),
        }
        with self._explained():
            self._manager.save(step, args=ocp.args.Composite(**items))
        self._newest = step

    def check(self) -> None:
        """Raises UserError if what is being written in the background has failed. Otherwise the
        next save would be the first to say so.
        """
        with self._explained():
            if not self._manager.is_saving_in_progress():
                # its `check_for_errors` does not see what ended the last save
                self._manager.wait_until_finished()

    def best(self) -> tuple[int, float] | None:
        """The step with the best number among the checkpoints, and that number."""
        steps = self._best_first(self._manager.all_steps())
        return (steps[0], self._ranked[steps[0]]) if steps else None

    def restore(self, params, opt_state, data: grain.DatasetIterator):
        """The newest whole checkpoint as (step, params, opt_state), with `data` moved to its place;
        None if there is none.

        `params` and `opt_state` are trees of `ShapeDtypeStruct` with shardings: the mesh may differ
        from the one that saved. A damaged checkpoint is passed over with a warning, and moved to
        `damaged/` so that it can be written again; so is one whose weights are not finite.
        UserError where none is whole, where one cannot be read for a reason that may pass (after
        some tries), and where the data or the number of streams are others.
        """
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            self._check_place(step)
            read, failure = self._read(step, params, opt_state)
            if read is None:
                damaged[step] = failure
                continue
            self._move_aside(damaged)
            self._newest = step
            *state, places = read
            data.set_state({"parents": [places[stream] for stream in self._here]})
            return step, *state
        if damaged:
            raise UserError(
                f"none of the checkpoints in {self._folder} can be read (step {max(damaged)}:"
                f" {damaged[max(damaged)]}); restore or delete them, or choose another out folder"
            )
        return None

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Orbax's question which checkpoints to keep, in the order of their steps."""
        return self._preserved([checkpoint.step for checkpoint in checkpoints])

    def _preserved(self, steps: list[int]) -> list[bool]:
        ours = [step for step in steps if self._is_ours(step)]
        best = self._best_first(ours)[: self._keep_best]
        # Somebody else's folder that has a number for a name is not ours to remove.
        return [step in (*ours[-self._keep :], *best) or step not in ours for step in steps]

    def _best_first(self, steps: Iterable[int]) -> list[int]:
        """Those of `steps` whose number is known."""
        known = [step for step in steps if step in self._ranked]
        return sorted(known, key=lambda step: (self._sign * self._ranked[step], step))

    def _is_ours(self, step: int) -> bool:
        contents = self._contents(step)
        return bool(contents & CONTENTS) or not contents

    def _contents(self, step: int) -> set[str]:
        folder = self._folder / str(step)
        return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            with self._explained():
                # `close` does not wait for the thread that removes half-written checkpoints, which
                # would print a traceback if Python ended first.
                self._manager._maybe_await_cleanup_tmp_directory()
                self._manager.close()
                if kind is None and jax.process_index() == 0:
                    self._remove_half_deleted()
        except UserError:
            # The first error is the cause, and the one to tell.
            if kind is None:
                raise
        finally:
            self._alias.__exit__(None, None, None)

    # Reading

    def _read(self, step: int, params, opt_state) -> tuple[tuple | None, str]:
        """The weights, the optimizer's state and the places in the data of a step, found whole; or
        None and what is wrong with them. UserError where a fault does not pass.
        """
        items = {
            PARAMS: ocp.args.StandardRestore(params),
            OPTIMIZER: ocp.args.StandardRestore(opt_state),
            DATA: ocp.args.JsonRestore(),
            ABOUT: ocp.args.JsonRestore(),
        }

        def read():
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            state = jax.block_until_ready((restored[PARAMS], restored[OPTIMIZER]))
            return *state, restored[DATA][STREAMS]

        for wait in (*RETRIES, None):
            restored, verdict, failure = self._attempt(step, read)
            if verdict == READ:
                # All hosts have it, so all can compute the checksums, which they do together.
                verify = partial(self._verify, step, *restored)
                _, verdict, failure = self._attempt(step, verify)
            if verdict == READ:
                return restored, ""
            restored = None  # before the next one takes as much memory
            if verdict == DAMAGE:
                return None, failure
            if wait is None:
                raise UserError(
                    f"the checkpoint of step {step} in {self._folder} cannot be read now"
                    f" ({failure}), which says nothing about its contents; it stays where it is;"
                    " fix that and give the same command again"
                )
            if jax.process_index() == 0:
                warnings.warn(
                    f"the checkpoint of step {step} cannot be read ({failure}); trying again in"
                    f" {wait:.0f} s",
                    stacklevel=3,
                )
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _attempt(self, step: int, work: Callable):
        """(What `work` returns, the verdict of all hosts, what failed)."""
        result, verdict, failure = None, READ, ""
        try:
            result = work()
        # Orbax, TensorStore and JSON each raise errors of their own kinds.
        except Exception as error:  # noqa: BLE001
            failure = " ".join(str(error).split())[:200] or type(error).__name__
            unreadable = first_unreadable(self._folder / str(step))
            verdict = PASSING if unreadable or is_passing(error) else DAMAGE
            failure = (unreadable and explain(unreadable)) or failure
        # All hosts take the same way from here: one that went on alone would wait for ever.
        worst = hosts.largest(verdict)
        return result, worst, failure or "another host cannot read it"

    def _verify(self, step: int, params, opt_state, places: list[dict]) -> None:
        """Raises UserError or ValueError where what was read is not what was saved, or is not
        finite.
        """
        about = read_about(self._run, step)
        if about.pop("checksum", None) != _crc(about):
            raise ValueError(f"the checksum of {ABOUT} is not the one that was saved")
        saved = about["checksums"]
        for name, tree in ((PARAMS, params), (OPTIMIZER, opt_state)):
            compare(checksums(tree), saved[name], f"{name} of step {step}")
        if saved[DATA] != [_crc(place) for place in places]:
            raise ValueError("the checksum of the place in the data is not the one that was saved")
        if not all_finite(params):
            raise ValueError("its weights are not finite")

    def _about(self, step: int) -> dict:
        """What was noted beside a step; nothing where that is damaged."""
        about = read_about(self._run, step)
        return about if about.pop("checksum", None) == _crc(about) else {}

    def _check_place(self, step: int) -> None:
        if self._base:
            check_fingerprint(self._run, step, *self._base)
        about = read_about(self._run, step)
        for name, now in self._data.items():
            if (before := about.get(name, now)) != now:
                what = {
                    STREAMS: f"with data.streams={before}, not {now}",
                    "clips": f"from {before} training clips, not {now}",
                    "dataset": f"from other training data (fingerprint {before}, not {now})",
                }[name]
                raise UserError(
                    f"the run in {self._folder.parent} was made {what}, so its place in the data"
                    " has no meaning now; go on as it was, or choose another out folder"
                )

    # Folders

    def _move_aside(self, damaged: dict[int, str]) -> None:
        for step, failure in damaged.items():
            if jax.process_index() == 0:
                there = _free_name(self._folder.parent / DAMAGED / str(step))
                warnings.warn(
                    f"the checkpoint of step {step} is damaged and is passed over for the one"
                    f" before; it is now in {there}: {failure}",
                    stacklevel=3,
                )
                if is_remote(there):
                    storage.move(self._folder / str(step), there)
                else:
                    there.parent.mkdir(exist_ok=True)
                    (self._folder / str(step)).rename(there)
            self._ranked.pop(step, None)
        if damaged:
            hosts.largest(0)  # nobody looks before all is moved
            self._manager.reload()

    def _remove_half_deleted(self) -> None:
        """Removes what a process that was killed while it removed an old checkpoint has left, if no
        later save has done so. In a bucket, also what one that was killed while it wrote one has.
        """
        if is_remote(self._folder):
            for name, contents in remote_steps(self._folder).items():
                ours = name.isdecimal() and contents & CONTENTS and int(name) < self._newest
                if ours and not {*ITEMS, COMMIT} <= contents:
                    storage.remove(self._folder / name)
            return
        steps = saved_steps(self._run)
        for step, wanted in zip(steps, self._preserved(steps), strict=True):
            half = self._is_ours(step) and not ITEMS.issubset(self._contents(step))
            if step < self._newest and (half or not wanted):
                shutil.rmtree(self._folder / str(step), ignore_errors=True)

    def _check_writable(self) -> None:
        """UserError where nothing can be made in the folder. Orbax would wait 300 s for another
        thread that fails to make it.
        """
        with self._explained():
            if jax.process_index() == 0 and is_remote(self._folder):
                storage.check_writable(self._folder)
            elif jax.process_index() == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self._folder):
                    pass

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = "the disk is full" if is_full(error) else " ".join(str(error).split())[:200]
            since = "goes on after the last whole checkpoint"
            if not is_remote(self._folder):  # a bucket may not answer again
                saved = saved_steps(self._folder.parent)
                since = (
                    f"goes on after step {saved[-1]}, the last whole checkpoint"
                    if saved
                    else "starts again, for none is whole yet"
                )
            raise UserError(
                f"a checkpoint could not be written to {self._folder} ({reason}); fix that and"
                f" give the same command again, which {since}"
            ) from error


def _free_name(path: Path) -> Path:
    """`path`, or with a number after it where that exists: an earlier one is kept."""
    names = (path.with_name(f"{path.name}.{n}" if n else path.name) for n in range(10_000))
    return next(name for name in names if not name.exists())


def _crc(content) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
