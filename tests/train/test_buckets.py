"""Runs in a bucket: the same numbers as on this machine, and what is left of a killed one."""

import pytest
from tiny_run import losses, make_clips, make_model, settings_for

from llasa_jax.errors import UserError
from llasa_jax.runtime import storage
from llasa_jax.runtime.bucket_files import upload
from llasa_jax.runtime.copies import local_copy
from llasa_jax.train.loop import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    """The losses of a run on this machine."""
    run = tmp_path_factory.mktemp("reference") / "run"
    train(settings_for(model, run, train={"keep": 1}), [make_clips()], [make_clips()[:3]])
    return losses(run)


def bucket_losses(run):
    return losses(local_copy(run, lambda name: name == "metrics.jsonl"))


def test_a_run_in_a_bucket(bucket, model, reference):
    upload(model, f"{bucket}/model", "model.json")
    settings = settings_for(f"{bucket}/model", f"{bucket}/run", train={"keep": 1})
    train(settings, [make_clips()], [make_clips()[:3]])
    assert bucket_losses(f"{bucket}/run") == reference
    names = storage.entries(f"{bucket}/run")
    assert {"settings.yaml", "model.json", "hf/tokenizer.json"} <= set(names)
    assert [name for name in names if name.startswith("tensorboard/")]
    assert not [name for name in names if name.startswith(".claims")]
    steps = {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
    assert steps == {"6"}
    # It is done: the same command does nothing, and other settings are refused.
    train(settings, [make_clips()], [make_clips()[:3]])
    assert bucket_losses(f"{bucket}/run") == reference
    other = settings_for(f"{bucket}/model", f"{bucket}/run", train={"keep": 1, "rows": 8})
    with pytest.raises(UserError, match="made with other settings"):
        train(other, [make_clips()], [make_clips()[:3]])
