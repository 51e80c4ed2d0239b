"""S3, by moto's server: what differs from Google's store."""

import os

import jax
import numpy as np
import pytest
from buckets import environment, served
from tiny_run import make_model

from llasa_jax.convert.model_folder import load_params
from llasa_jax.errors import UserError
from llasa_jax.model.sharding import make_mesh
from llasa_jax.runtime import files, storage
from llasa_jax.runtime.bucket_files import upload
from llasa_jax.runtime.claims import Claim
from llasa_jax.runtime.copies import local_copy
from llasa_jax.runtime.storage import as_path


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
    files.write_whole(path, "text")
    assert files.read_text(path, "the text") == "text"
    assert [each.name for each in path.parent.iterdir()] == ["name.txt"]
    assert storage.create(f"{s3}/a/once", b"1")
    assert not storage.create(f"{s3}/a/once", b"2")
    assert storage.read_bytes(f"{s3}/a/once") == b"1"
    with files.new_folder(as_path(f"{s3}/new"), last="model.json") as partial:
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
