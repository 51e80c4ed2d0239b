"""Models in buckets: import, reading, export, with the same bytes as on this machine."""

import json

import jax
import numpy as np
import pytest
from reference import hf_llama

from llasa_jax.convert.export_hf import export_hf
from llasa_jax.convert.import_hf import import_hf
from llasa_jax.convert.made import MADE_FROM
from llasa_jax.convert.model_folder import load_params, load_tokenizer, open_model
from llasa_jax.convert.params_io import WORKERS
from llasa_jax.errors import UserError
from llasa_jax.model.sharding import make_mesh
from llasa_jax.runtime import bucket_files, claims, storage
from llasa_jax.runtime.bucket_files import upload
from llasa_jax.runtime.copies import local_copy
from llasa_jax.runtime.storage import as_path


@pytest.fixture(scope="module")
def hf(tmp_path_factory, tokenizer):
    """The folder of a Hugging Face checkpoint in two files."""
    folder = tmp_path_factory.mktemp("hf")
    hf_llama(vocab=len(tokenizer)).save_pretrained(folder, max_shard_size="4MB")
    tokenizer.save_pretrained(folder)
    return folder


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MADE_FROM  # names where the source lies
    }


@pytest.mark.soak
def test_from_a_bucket_to_a_bucket_and_back(bucket, hf, tmp_path):
    import_hf(hf, tmp_path / "model")
    import_hf(hf, as_path(f"{bucket}/model"))
    ours = files_of(tmp_path / "model")
    assert ours == files_of(local_copy(f"{bucket}/model"))

    # A checkpoint in a bucket is read in ranges, and is known by its folder's name.
    upload(hf, f"{bucket}/{hf.name}")
    import_hf(f"{bucket}/{hf.name}", as_path(f"{bucket}/again"))
    assert ours == files_of(local_copy(f"{bucket}/again"))

    mesh = make_mesh(2, 2, 2)
    local, remote = (
        load_params(where, mesh, "float32") for where in (tmp_path / "model", f"{bucket}/model")
    )
    jax.tree.map(np.testing.assert_array_equal, local, remote)
    straight = load_params(f"{bucket}/{hf.name}", mesh, "float32")
    jax.tree.map(np.testing.assert_array_equal, local, straight)
    assert len(load_tokenizer(f"{bucket}/model")) == len(load_tokenizer(hf))
    assert (
        open_model(f"{bucket}/model").fingerprint() == open_model(tmp_path / "model").fingerprint()
    )

    export_hf(as_path(f"{bucket}/model"), as_path(f"{bucket}/release"))
    export_hf(as_path(f"{bucket}/model"), tmp_path / "release")
    assert files_of(local_copy(f"{bucket}/release")) == files_of(tmp_path / "release")
    assert "model.safetensors" in storage.entries(f"{bucket}/release")


def test_files_of_a_release_go_up_as_they_are_whole(bucket, hf, tmp_path, monkeypatch):
    """The disk here holds no more than some files of the release at a time."""
    import_hf(hf, tmp_path / "model")
    at_once, put_early = [], bucket_files.put_early

    def watched(file, destination):
        at_once.append(len([*file.parent.glob("*.safetensors")]))
        put_early(file, destination)

    monkeypatch.setattr("llasa_jax.convert.export_hf.put_early", watched)
    options = {"max_shard_size": "8KB", "dtype": "float16"}
    export_hf(tmp_path / "model", as_path(f"{bucket}/release"), **options)
    export_hf(tmp_path / "model", tmp_path / "release", **options)
    made = files_of(tmp_path / "release")
    assert files_of(local_copy(f"{bucket}/release")) == made
    files = [name for name in made if name.endswith(".safetensors")]
    assert len(at_once) == len(files) > WORKERS + 2
    assert max(at_once) <= WORKERS + 1

    # One that fails leaves nothing, so that the same command can be given again.
    def fails(source, *_):
        raise UserError("the disk is full")

    monkeypatch.setattr("llasa_jax.convert.export_hf.copy_small_files", fails)
    with pytest.raises(UserError, match="the disk is full"):
        export_hf(tmp_path / "model", as_path(f"{bucket}/another"), **options)
    assert storage.entries(f"{bucket}/another") == {}


def test_what_is_wrong_in_a_bucket_is_told(bucket, hf, capsys):
    with pytest.raises(UserError, match="the model is not there"):
        open_model(f"{bucket}/none")
    with pytest.raises(UserError, match="access denied"):
        import_hf(hf, as_path("gs://read-only/model"))
    import_hf(hf, as_path(f"{bucket}/model"))
    import_hf(hf, as_path(f"{bucket}/model"))
    assert "done already by the same command" in capsys.readouterr().out
    with pytest.raises(UserError, match="already exists and is not empty"):
        import_hf(hf, as_path(f"{bucket}/model"), dtype="float16")
    # Half a model: without the file that is written last, and without a weight.
    storage.remove(f"{bucket}/model/params/layers.q")
    with pytest.raises(UserError, match=r"holds no readable layers.q \(.*use another checkpoint"):
        load_params(f"{bucket}/model", make_mesh(2, 2, 2), "float32")
    storage.remove(f"{bucket}/model/model.json")
    with pytest.raises(UserError, match="holds no model: it has no model.json"):
        open_model(f"{bucket}/model")
    # What a process that was killed as it put the files up has left is written again.
    dead = {"process": f"{claims._machine()} 999999999 1"}
    storage.create(f"{bucket}/model/.claims/00000001", json.dumps(dead).encode())
    import_hf(hf, as_path(f"{bucket}/model"))
    load_params(f"{bucket}/model", make_mesh(2, 2, 2), "float32")
    storage.write_bytes(f"{bucket}/cut/config.json", (hf / "config.json").read_bytes())
    name = "model-00001-of-00002.safetensors"
    storage.write_bytes(f"{bucket}/cut/model.safetensors", (hf / name).read_bytes()[:-1000])
    with pytest.raises(UserError, match="is truncated, or holds bytes of no tensor"):
        open_model(f"{bucket}/cut")
