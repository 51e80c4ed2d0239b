"""Runs in a bucket: the same numbers as on this machine, and what is left of a killed one."""

import dataclasses
import subprocess
import sys
import time

import pytest
from places import FIXTURES, environment
from tiny_run import losses, make_clips, make_model, settings_for

from llasa_jax.convert.model_folder import saved_steps
from llasa_jax.encode.settings import DataSettings
from llasa_jax.errors import UserError
from llasa_jax.finetune import check_buckets
from llasa_jax.model.settings import ModelSettings
from llasa_jax.runtime import storage
from llasa_jax.runtime.bucket_files import upload
from llasa_jax.runtime.claims import Claim
from llasa_jax.runtime.copies import local_copy
from llasa_jax.train.loop import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    """The losses of a run on this machine."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert started(model, run).wait() == 0
    return losses(run)


def started(model, out):
    """`tiny_run` in a process with one device."""
    command = [sys.executable, str(FIXTURES / "tiny_run.py"), str(model), str(out)]
    return subprocess.Popen(command, env=environment(1))


def settings(model, out, **train):
    """As `tiny_run` has them, for the eight devices here."""
    return settings_for(model, out, train={"keep": 1} | train)


def bucket_losses(run):
    return losses(local_copy(run, lambda name: name == "metrics.jsonl"))


def test_a_run_in_a_bucket(bucket, model, reference):
    upload(model, f"{bucket}/model", "model.json")
    run = f"{bucket}/run"
    assert started(f"{bucket}/model", run).wait() == 0
    assert bucket_losses(run) == reference
    names = storage.entries(run)
    assert {"settings.yaml", "model.json", "hf/tokenizer.json"} <= set(names)
    assert [name for name in names if name.startswith("tensorboard/")]
    assert not [name for name in names if name.startswith(".claims")]
    assert saved_steps(run) == [6]
    # It is done: the same command does nothing, and other settings are refused.
    train(settings(f"{bucket}/model", run), [make_clips()], [make_clips()[:3]])
    assert bucket_losses(run) == reference
    with pytest.raises(UserError, match="made with other settings"):
        train(settings(f"{bucket}/model", run, rows=8), [make_clips()], [make_clips()[:3]])
    with Claim(run, "training"), pytest.raises(UserError, match="another process"):
        train(settings(f"{bucket}/model", run), [make_clips()], [make_clips()[:3]])


@pytest.mark.soak
def test_a_run_in_a_bucket_that_is_killed_as_it_saves_goes_on(bucket, model, reference):
    run = f"{bucket}/run"
    with started(model, run) as process:
        while not any(name.startswith("checkpoints/4/") for name in storage.entries(run)):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert any(name.startswith(".claims/") for name in storage.entries(run))
    assert saved_steps(run) in ([2], [2, 4], [4])
    assert started(model, run).wait() == 0
    assert bucket_losses(run) == reference
    assert saved_steps(run) == [6]
    assert not [name for name in storage.entries(run) if name.startswith("checkpoints/4")]


def test_buckets_are_looked_at_before_anything_is_loaded(bucket, model):
    def refused(**changes):
        ours = dataclasses.replace(settings(model, f"{bucket}/run"), **changes)
        with pytest.raises(UserError) as error:
            check_buckets(ours)
        return str(error.value)

    elsewhere = ModelSettings(path="gs://no-such/model", loss_chunk=32)
    assert "the model is not there, for there is no bucket" in refused(model=elsewhere)
    assert "gs://read-only: access denied" in refused(out="gs://read-only/run")
    assert "there is no bucket gs://no-such" in refused(out="gs://no-such/run")
    compiled = dataclasses.replace(settings(model, "unused").mesh, compiled="gs://read-only/x")
    assert "gs://read-only: access denied" in refused(mesh=compiled)
    copies = DataSettings(path="unused", cache_dir=f"{bucket}/copies")
    assert "kept on this machine; name a folder of its disk" in refused(data=copies)
    data = DataSettings(path=f"{bucket}/none", max_length=128)
    assert f"{bucket}/none: the dataset is not there; check the path" in refused(data=data)
