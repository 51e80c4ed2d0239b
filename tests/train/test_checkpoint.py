"""Checkpoints: damage of every kind, what is kept, errors that come late, and resuming where the
place in the data has no meaning.
"""

import asyncio
import errno
import gc
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from buckets import faults

from llasa_jax.convert.model_folder import saved_steps
from llasa_jax.errors import UserError
from llasa_jax.runtime import storage
from llasa_jax.runtime.storage import as_path
from llasa_jax.train.checkpoints import Checkpoints

# Orbax leaves other reads behind when one fails, and they complain on their own.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def hear_complaints_here():
    yield
    gc.collect()


ABSTRACT = {
    "a": jax.ShapeDtypeStruct((40, 30), jnp.float32),
    "b": {"c": jax.ShapeDtypeStruct((10,), jnp.float32)},
}


def stream():
    return grain.MapDataset.range(100).shuffle(0).to_iter_dataset().batch(2)


def data():
    return iter(grain.experimental.ZipIterDataset([stream()]))


def tree(step):
    noise = np.random.default_rng(abs(step)).normal(size=(40, 30)).astype(np.float32)
    return {"a": jnp.asarray(noise), "b": {"c": jnp.full(10, step, jnp.float32)}}


def save(run, steps, keep=9, keep_best=0, losses=None, clips=3):
    order = data()
    with Checkpoints(run, keep, keep_best, clips) as checkpoints:
        for step in range(1, max(steps) + 1):
            next(order)
            if step in steps:
                numbers = {"validation_loss": losses[step]} if step in (losses or {}) else {}
                checkpoints.save(step, tree(step), tree(-step), order, numbers)
    return run


def restore(run, clips=3):
    """The step that was restored, once all of it is found to be that step's."""
    order = data()
    with Checkpoints(run, 9, clips=clips) as checkpoints:
        restored = checkpoints.restore(ABSTRACT, ABSTRACT, order)
    if restored is None:
        return None
    step, params, opt_state = restored
    jax.tree.map(np.testing.assert_array_equal, (params, opt_state), (tree(step), tree(-step)))
    expected = data()
    for _ in range(step):
        next(expected)
    np.testing.assert_array_equal(next(order), next(expected))
    return step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save(tmp_path_factory.mktemp("runs") / "whole", (2, 4, 6))


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def test_the_newest_comes_back(run):
    assert restore(run) == 6


def test_none_yet(tmp_path):
    assert restore(tmp_path) is None


WHERE = (
    "params/manifest.ocdbt",
    "params/ocdbt.process_0/d/*",
    "params/d/*",
    "optimizer/ocdbt.process_0/d/*",
    "data/metadata",
    "about/metadata",
)


def damage(run, how, where):
    """Damages the largest of the files; true if there was something to damage."""
    if how == "no folder":
        shutil.rmtree(run / "checkpoints" / "6" / where.split("/")[0])
    elif how == "empty folder":
        shutil.rmtree(run / "checkpoints" / "6")
        (run / "checkpoints" / "6").mkdir()
    else:
        file = max((run / "checkpoints" / "6").glob(where), key=lambda path: path.stat().st_size)
        content = file.read_bytes()
        half = len(content) // 2
        file.unlink()
        if how != "missing":
            file.write_bytes(
                {
                    "truncated": content[:half],
                    "empty": b"",
                    "zeroed": content[:half] + bytes(len(content) - half),
                }[how]
            )


KINDS = [(how, where) for how in ("missing", "truncated", "empty", "zeroed") for where in WHERE]
FOLDERS = [
    ("no folder", where) for where in WHERE if where.split("/")[1] in ("manifest.ocdbt", "metadata")
]


@pytest.mark.parametrize(("how", "where"), [*KINDS, *FOLDERS, ("empty folder", "")])
def test_damage_is_passed_over_and_moved_aside(run, how, where):
    damage(run, how, where)
    with pytest.warns(
        UserWarning,
        match=(
            "checkpoint of step 6 is damaged and is passed over for the one before; it is now in"
            " .*damaged/6"
        ),
    ):
        assert restore(run) == 4
    assert saved_steps(run) == [2, 4]
    assert (run / "damaged" / "6").is_dir()


def test_where_all_are_damaged_nothing_begins_anew(run):
    for step in (2, 4, 6):
        (run / "checkpoints" / str(step) / "params" / "manifest.ocdbt").unlink()
    with pytest.raises(
        UserError,
        match=r"none of the checkpoints in .* can be read \(step 6: .*; restore or delete them",
    ):
        restore(run)
    assert saved_steps(run) == [2, 4, 6]


def test_another_place_in_the_data_is_refused(run):
    with pytest.raises(
        UserError,
        match="was made from 3 training clips, not 4, so its place in the data has no meaning now",
    ):
        restore(run, clips=4)
    about = run / "checkpoints" / "6" / "about" / "metadata"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"streams": 2}))
    with pytest.raises(UserError, match="was made with data.streams=2, not 1"):
        restore(run)
    assert saved_steps(run) == [2, 4, 6]


@pytest.mark.parametrize(
    ("keep", "keep_best", "kept"),
    [(2, 0, [5, 6]), (1, 1, [2, 6]), (1, 2, [2, 4, 6]), (2, 3, [2, 4, 5, 6])],
    ids=str,
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep, keep_best, kept):
    losses = {1: 3.5, 2: 1.0, 3: 4.0, 4: 2.0, 6: 3.0}
    first, then = {1: 3.5, 2: 1.0, 3: 4.0}, {4: 2.0, 6: 3.0}
    save(tmp_path, range(1, 4), keep, keep_best, first)
    # The losses of before are known to the process that goes on.
    with Checkpoints(tmp_path, keep, keep_best, 3) as checkpoints:
        for step in (4, 5, 6):
            numbers = {"validation_loss": then[step]} if step in then else {}
            checkpoints.save(step, tree(step), tree(-step), data(), numbers)
        best = min((losses[step], step) for step in kept if step in losses)
        assert checkpoints.best() == best[::-1]
    assert saved_steps(tmp_path) == kept


@pytest.mark.parametrize(
    "reason", [OSError(errno.ENOSPC, "No space left on device"), ValueError("the wind")]
)
def test_what_fails_in_the_background_is_told_before_the_next_save(tmp_path, monkeypatch, reason):
    save(tmp_path, [1], keep=1)

    def fail(source, destination, **_):
        raise reason

    with Checkpoints(tmp_path, 1, clips=3) as checkpoints:
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, fail)
        checkpoints.save(2, tree(2), tree(-2), data())
        words = "the disk is full" if isinstance(reason, OSError) else "the wind"
        sentence = (
            rf"could not be written to .* \(.*{words}.*\); .* goes on after step 1, the last whole"
            r" checkpoint"
        )
        with pytest.raises(UserError, match=sentence):
            check_for_ever(checkpoints)
        monkeypatch.undo()
    assert restore(tmp_path) == 1


def check_for_ever(checkpoints):
    while True:
        checkpoints.check()


def write_again(run, step, params, opt_state):
    """Writes other weights into a whole checkpoint, with the checksums of before: what a flipped
    bit in memory, or one that the file format does not notice, leaves behind.
    """
    about = run / "checkpoints" / str(step) / "about" / "metadata"
    before = about.read_text()
    shutil.rmtree(run / "checkpoints" / str(step))
    order = data()
    for _ in range(step):
        next(order)
    with Checkpoints(run, 9, clips=3) as checkpoints:
        checkpoints.save(step, params, opt_state, order)
    about.write_text(before)


def flipped(tree, name):
    array = np.array(tree[name])
    array.view(np.uint32).flat[array.size // 3] ^= 1 << 3
    return tree | {name: jnp.asarray(array)}


@pytest.mark.parametrize("where", ["params", "optimizer"])
def test_one_flipped_bit_is_found_and_the_tensor_named(run, where):
    params, opt_state = tree(6), tree(-6)
    if where == "params":
        write_again(run, 6, flipped(params, "a"), opt_state)
    else:
        write_again(run, 6, params, flipped(opt_state, "a"))
    with pytest.warns(UserWarning, match=f"step 6 is damaged .*{where}.*the checksum of a is not"):
        assert restore(run) == 4
    assert saved_steps(run) == [2, 4]


def test_a_changed_digit_of_the_place_in_the_data_is_found(run):
    place = run / "checkpoints" / "6" / "data" / "metadata"
    place.write_text(re.sub(r"\d+", lambda number: str(int(number[0]) + 2), place.read_text()))
    with pytest.warns(UserWarning, match="the checksum of the place in the data"):
        assert restore(run) == 4


def test_a_changed_digit_beside_the_checkpoint_is_found(run):
    about = run / "checkpoints" / "6" / "about" / "metadata"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"validation_loss": 0.5}))
    with Checkpoints(run, 9, clips=3) as checkpoints:
        assert checkpoints.best() is None
    with pytest.warns(UserWarning, match="the checksum of about"):
        assert restore(run) == 4


def test_weights_that_are_not_finite_are_neither_saved_nor_gone_back_to(run):
    bad = tree(8) | {"b": {"c": jnp.full(10, jnp.nan)}}
    with (
        Checkpoints(run, 9, clips=3) as checkpoints,
        pytest.raises(UserError, match="the weights became infinite or nan by step 8"),
    ):
        checkpoints.save(8, bad, tree(-8), data())
    assert saved_steps(run) == [2, 4, 6]
    # Nor is one gone back to that was saved all the same.
    shutil.rmtree(run / "checkpoints" / "6")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llasa_jax.train.checkpoints.all_finite", lambda _: True)
        with Checkpoints(run, 9, clips=3) as checkpoints:
            checkpoints.save(6, bad, tree(-6), data())
    with pytest.warns(UserWarning, match="step 6 is damaged .* its weights are not finite"):
        assert restore(run) == 4


@pytest.mark.parametrize(
    "fault",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.EIO, "Input/output error"),
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"),
        ValueError("PERMISSION_DENIED: Error opening zarr driver"),
    ],
    ids=lambda fault: (str(fault) or "memory")[:20],
)
def test_a_passing_fault_is_not_damage(run, monkeypatch, fault):
    """Tried again; then an error that leaves the checkpoint where it is."""
    real, left = ocp.CheckpointManager.restore, [2]

    def hiccup(self, *arguments, **more):
        if left[0]:
            left[0] -= 1
            raise fault
        return real(self, *arguments, **more)

    monkeypatch.setattr("llasa_jax.train.checkpoints.RETRIES", (0.0, 0.0))
    monkeypatch.setattr(ocp.CheckpointManager, "restore", hiccup)
    with pytest.warns(UserWarning, match="step 6 cannot be read .*trying again"):
        assert restore(run) == 6
    left[0] = 9
    with (
        pytest.warns(UserWarning, match="trying again"),
        pytest.raises(UserError, match="step 6 in .* cannot be read now .* it stays where it is"),
    ):
        restore(run)
    assert saved_steps(run) == [2, 4, 6]
    assert not (run / "damaged").exists()


def test_what_cannot_be_opened_is_not_damage(run, monkeypatch):
    """Orbax takes a file that it may not open for one that is not there."""
    shutil.rmtree(run / "checkpoints" / "6" / "data")
    real = Path.open

    def closed(self, *arguments, **more):
        if self.name == "manifest.ocdbt":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *arguments, **more)

    monkeypatch.setattr("llasa_jax.train.checkpoints.RETRIES", ())
    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(UserError, match="manifest.ocdbt: permission denied"):
        restore(run)
    assert saved_steps(run) == [2, 4, 6]


def test_a_folder_that_cannot_be_written_to_is_told_at_once(run, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    began = time.monotonic()
    with Checkpoints(run, 9, clips=3) as checkpoints:
        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
        with pytest.raises(UserError, match="could not be written .*Permission denied"):
            checkpoints.save(8, tree(8), tree(-8), data())
        with pytest.raises(UserError, match="goes on after step 6"):
            Checkpoints(run, 9, clips=3)
    assert time.monotonic() - began < 60
    assert saved_steps(run) == [2, 4, 6]


def test_half_deleted_checkpoints_are_removed_and_foreign_folders_are_not(run):
    shutil.rmtree(run / "checkpoints" / "2" / "params")
    (run / "checkpoints" / "3").mkdir()
    (run / "checkpoints" / "3" / "letter.txt").write_text("dear")
    (run / "checkpoints" / "06").mkdir()
    assert restore(run) == 6
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["06", "3", "4", "6"]
    with Checkpoints(run, 1, clips=3) as checkpoints:
        checkpoints.save(8, tree(8), tree(-8), data())
    assert (run / "checkpoints" / "3" / "letter.txt").read_text() == "dear"
    assert not (run / "checkpoints" / "4").exists()


def test_other_data_of_the_same_size_is_refused(tmp_path):
    order = data()
    next(order)
    with Checkpoints(tmp_path, 9, clips=3, data="abc") as checkpoints:
        checkpoints.save(1, tree(1), tree(-1), order)
    assert restore(tmp_path) == 1  # whose data has no fingerprint
    with (
        Checkpoints(tmp_path, 9, clips=3, data="xyz") as checkpoints,
        pytest.raises(UserError, match=r"from other training data \(fingerprint abc, not xyz\)"),
    ):
        checkpoints.restore(ABSTRACT, ABSTRACT, data())


@pytest.mark.parametrize(
    "name", ["run[1]", "a\\b", "a#b?c%20d|e", "two\nlines", os.fsdecode(b"caf\xe9")], ids=ascii
)
def test_any_folder_name_goes_on(tmp_path, name):
    assert restore(save(tmp_path / name, (2, 4))) == 4
    assert saved_steps(tmp_path / name) == [2, 4]


# In a bucket


def test_damage_in_a_bucket_is_passed_over(bucket):
    run = save(as_path(f"{bucket}/run"), (2, 4, 6, 8))
    storage.remove(f"{run}/checkpoints/8/commit_success.txt")  # killed as it was written
    assert saved_steps(run) == [2, 4, 6]
    storage.write_bytes(f"{run}/checkpoints/6/about/metadata", b"{")
    with pytest.warns(UserWarning, match="checkpoint of step 6 is damaged and is passed over"):
        assert restore(run) == 4
    assert saved_steps(run) == [2, 4]
    names = [name.rsplit("/", 1)[0] for name in storage.entries(run)]
    assert "damaged/6/about" in names
    assert not [name for name in names if name.startswith("checkpoints/6")]


def test_a_store_that_fails_now_and_then_costs_nothing(bucket):
    faults({"share": 0.1, "kinds": ["500", "429", "cut"], "most": 12, "seed": 3})
    run = save(as_path(f"{bucket}/run"), (2, 4))
    assert sum(faults().values()) == 12
    faults({})
    assert restore(run) == 4


def test_a_store_that_is_down_ends_the_run_in_one_sentence(bucket, monkeypatch):
    real = asyncio.sleep
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", lambda _: real(0))
    order = data()
    run = as_path(f"{bucket}/run")

    def train():
        with Checkpoints(run, 9, clips=3) as checkpoints:
            checkpoints.save(1, tree(1), tree(-1), order)
            checkpoints._manager.wait_until_finished()
            faults({"down": True})
            checkpoints.save(2, tree(2), tree(-2), order)
            for _ in range(400):
                checkpoints.check()
                time.sleep(0.1)

    with pytest.raises(UserError, match=r"could not be written to gs://.*the last whole"):
        train()
    faults({})
    assert saved_steps(run) == [1]
