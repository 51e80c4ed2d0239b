"""S3, by moto's server: what differs from Google's store."""

import os
import subprocess
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from buckets import environment, served
from places import FIXTURES
from places import environment as of_devices
from tiny_run import losses, make_model

from llasa_jax.convert.model_folder import load_params, saved_steps
from llasa_jax.errors import UserError
from llasa_jax.model.sharding import make_mesh
from llasa_jax.runtime import files, storage, writing
from llasa_jax.runtime.bucket_files import upload
from llasa_jax.runtime.claims import Claim
from llasa_jax.runtime.copies import local_copy
from llasa_jax.runtime.storage import as_path
from llasa_jax.train import orbax_on_s3
from llasa_jax.train.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with (
        served("s3", tmp_path_factory.mktemp("store")) as address,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in environment("s3", address).items():
            patch.setenv(name, value)
        patch.setenv("LLASA_JAX_CACHE", os.fspath(tmp_path_factory.mktemp("copies")))
        storage.file_system("s3://bucket").mkdir("s3://bucket")
        yield "s3://bucket"


def test_files_folders_and_claims(s3):
    path = as_path(s3) / "a" / "name.txt"
    writing.write_whole(path, "text")
    assert files.read_text(path, "the text") == "text"
    assert [each.name for each in path.parent.iterdir()] == ["name.txt"]
    assert storage.create(f"{s3}/a/once", b"1")
    assert not storage.create(f"{s3}/a/once", b"2")
    assert storage.read_bytes(f"{s3}/a/once") == b"1"
    with writing.new_folder(as_path(f"{s3}/new"), last="model.json") as partial:
        (partial / "model.json").write_text("{}")
        (partial / "x").write_bytes(b"1")
    assert sorted(storage.entries(f"{s3}/new")) == ["model.json", "x"]
    assert (local_copy(f"{s3}/new") / "x").read_bytes() == b"1"
    with Claim(f"{s3}/run", "writing"), pytest.raises(UserError, match="another process"):
        Claim(f"{s3}/run", "writing").__enter__()
    assert storage.entries(f"{s3}/run") == {}
    storage.move(f"{s3}/new", f"{s3}/moved")
    assert sorted(storage.entries(f"{s3}/moved")) == ["model.json", "x"]


def test_what_is_not_there(s3):
    with pytest.raises(UserError, match="there is no bucket s3://no-such-bucket"):
        storage.check_reachable("s3://no-such-bucket/x", "the model")
    with pytest.raises(UserError, match="the model is not there; check the path"):
        storage.check_reachable(f"{s3}/none", "the model")
    with pytest.raises(UserError, match="there is no bucket s3://no-such-bucket"):
        storage.check_writable("s3://no-such-bucket/x")


def test_a_model_is_read_into_shards(s3, tmp_path):
    model = make_model(tmp_path / "model")
    upload(model, f"{s3}/model", "model.json")
    mesh = make_mesh(2, 2, 2)
    ours, theirs = (load_params(where, mesh, "float32") for where in (model, f"{s3}/model"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_checkpoints(s3):
    """Saved, pruned, one damaged and passed over, read again: by Orbax through TensorStore."""
    run, mesh = as_path(f"{s3}/checkpoints-of-a-run"), make_mesh(1, 4, 2)
    places = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))

    def tree(step):
        return {"a": jax.device_put(jnp.arange(32.0).reshape(8, 4) + step, places)}

    def data():
        stream = grain.MapDataset.range(100).to_iter_dataset().batch(2)
        return iter(grain.experimental.ZipIterDataset([stream]))

    order = data()
    with Checkpoints(run, keep=2, clips=3) as checkpoints:
        for step in range(1, 4):
            next(order)
            checkpoints.save(step, tree(step), tree(-step), order)
    assert saved_steps(run) == [2, 3]
    storage.write_bytes(f"{run}/checkpoints/3/about/metadata", b"{")
    target = {"a": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=places)}
    again = data()
    with (
        Checkpoints(run, keep=2, clips=3) as checkpoints,
        pytest.warns(UserWarning, match="checkpoint of step 3 is damaged and is passed over"),
    ):
        step, params, opt_state = checkpoints.restore(target, target, again)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, (params, opt_state), (tree(2), tree(-2)))
    np.testing.assert_array_equal(next(again), [[4, 5]])
    assert saved_steps(run) == [2]
    assert "damaged/3/about/metadata" in storage.entries(run)


def test_another_version_of_orbax_is_refused(monkeypatch):
    names = (*orbax_on_s3.NAMES, (orbax_on_s3.gcs_utils, "no_longer_there"))
    monkeypatch.setattr(orbax_on_s3, "NAMES", names)
    with pytest.raises(UserError, match="it has no no_longer_there.*install orbax-checkpoint 0.12"):
        orbax_on_s3.let_orbax_use_s3.__wrapped__()


@pytest.mark.soak
def test_a_run_that_is_killed_as_it_saves_goes_on(s3, tmp_path):
    model = make_model(tmp_path / "model")

    def started(out):
        command = [sys.executable, str(FIXTURES / "tiny_run.py"), str(model), str(out)]
        return subprocess.Popen(command, env=of_devices(1))

    assert started(tmp_path / "run").wait() == 0
    run = f"{s3}/run-of-a-model"
    with started(run) as process:
        while not any(name.startswith("checkpoints/4/") for name in storage.entries(run)):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert saved_steps(run) in ([2], [2, 4], [4])
    assert started(run).wait() == 0
    assert saved_steps(run) == [6]
    lines = local_copy(run, lambda name: name == "metrics.jsonl")
    assert losses(lines) == losses(tmp_path / "run")
    mesh = make_mesh(2, 2, 2)
    ours, theirs = (load_params(where, mesh, "float32") for where in (tmp_path / "run", run))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
