"""Checkpoints: damage of every kind, what is kept, errors that come late, and resuming where the
place in the data has no meaning.
"""

import errno
import gc
import json
import os
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llasa_jax.convert.model_folder import saved_steps
from llasa_jax.errors import UserError
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


def data():
    return iter(grain.MapDataset.range(100).shuffle(0).to_iter_dataset().batch(2))


def tree(step):
    noise = np.random.default_rng(abs(step)).normal(size=(40, 30)).astype(np.float32)
    return {"a": jnp.asarray(noise), "b": {"c": jnp.full(10, step, jnp.float32)}}


def save(run, steps, keep=9, keep_best=0, losses=None, clips=3):
    order = data()
    with Checkpoints(run, keep, keep_best, clips) as checkpoints:
        for step in range(1, max(steps) + 1):
            next(order)
            if step in steps:
                checkpoints.save(step, tree(step), tree(-step), order, (losses or {}).get(step))
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
    "data/*.json",
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
    ("no folder", where)
    for where in WHERE
    if where.split("/")[1] in ("manifest.ocdbt", "*.json", "metadata")
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
        match=r"none of the checkpoints in .* can be read \(step 6: .*; mend or delete them",
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
    about.write_text(json.dumps(json.loads(about.read_text()) | {"hosts": 2}))
    with pytest.raises(UserError, match="was made on 2 hosts, not 1"):
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
            checkpoints.save(step, tree(step), tree(-step), data(), then.get(step))
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
