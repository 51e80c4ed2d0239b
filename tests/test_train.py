"""The loop: it learns, writes what it says it writes, goes on after any end, and refuses what cannot work."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from reference import config_of, hf_llama, params_of

from llasa_jax import model_folder
from llasa_jax import train as train_module
from llasa_jax.checkpoint import Checkpoints
from llasa_jax.errors import UserError
from llasa_jax.prompts import Utterance
from llasa_jax.settings import DataSettings, LogSettings, MeshSettings, ModelSettings, OptimizerSettings, Settings, TrainSettings
from llasa_jax.sharding import make_mesh
from llasa_jax.tiny_llama import make_tiny_tokenizer
from llasa_jax.train import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = make_tiny_tokenizer()
    hf = hf_llama(vocab=len(tokenizer), initializer_range=0.02)
    model_folder.write_description(folder, config_of(hf), {"base_model": "tiny"})
    model_folder.save_params(folder, params_of(hf))
    tokenizer.save_pretrained(folder / "hf")
    return folder


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    return [[Utterance(f"word {i}", rng.integers(0, 65_536, 10 + i).astype(np.uint16), f"clip{i}", "ada") for i in range(12)]]


def settings_for(model, out, **changes):
    settings = Settings(
        out=str(out),
        model=ModelSettings(path=str(model), dtype="float32", loss_chunk=32),
        data=DataSettings(path="unused", max_length=128),
        mesh=MeshSettings(data=2, fsdp=2, tensor=2),
        optimizer=OptimizerSettings(learning_rate=1e-2),
        train=TrainSettings(steps=6, rows=4, save_every=2, validate_every=3),
        log=LogSettings(every=2),
    )
    for group, values in changes.items():
        settings = dataclasses.replace(settings, **{group: dataclasses.replace(getattr(settings, group), **values)})
    return settings


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def finished(model, clips, tmp_path_factory):
    return train(settings_for(model, tmp_path_factory.mktemp("runs") / "whole"), clips, clips)


def test_it_learns_and_says_so(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert set(steps[0]) == {
        "step", "loss", "accuracy", "grad_norm", "targets", "fill", "learning_rate", "tokens_per_second",
    }  # fmt: skip
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6]
    assert list((finished / "tensorboard").glob("events.*"))
    assert model_folder.saved_steps(finished) == [4, 6]


def test_a_run_is_a_model(finished, model):
    config, source = model_folder.read_description(finished)
    assert config == model_folder.read_description(model)[0]
    assert source["base_model"] == "tiny"
    assert source["prompt"]["date"] == "26 Jul 2024"
    assert (finished / "hf" / "tokenizer.json").read_bytes() == (model / "hf" / "tokenizer.json").read_bytes()
    one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    latest, older = (model_folder.load_params(finished, one, np.float32, step) for step in (None, 4))
    assert np.abs(latest["embed"] - older["embed"]).max() > 0
    with pytest.raises(UserError, match="has no checkpoint of step 5; it has 4, 6"):
        model_folder.load_params(finished, one, np.float32, 5)


def test_the_same_command_again_does_nothing_more(finished, model, clips, capsys):
    before = losses(finished)
    train(settings_for(model, finished), clips, clips)
    assert "going on after step 6" in capsys.readouterr().out
    assert losses(finished) == before


def test_sigterm_saves_and_the_same_command_goes_on(finished, model, clips, tmp_path, monkeypatch):
    real_place, count = train_module._place, iter(range(100))

    def place(*args):
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_place(*args)

    monkeypatch.setattr(train_module, "_place", place)
    settings = settings_for(model, tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        train(settings, clips)
    assert stop.value.code == 128 + signal.SIGTERM
    assert model_folder.saved_steps(tmp_path / "run") == [2, 3]
    monkeypatch.setattr(train_module, "_place", real_place)
    train(settings, clips)
    assert losses(tmp_path / "run") == losses(finished)


def test_a_damaged_checkpoint_is_passed_over(finished, model, clips, tmp_path):
    run = tmp_path / "run"
    settings = settings_for(model, run)
    train(settings, clips)
    for file in (run / "checkpoints" / "6" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.warns(UserWarning, match="checkpoint of step 6 is damaged"):
        train(settings, clips)
    assert losses(run) == losses(finished)


def test_another_mesh_goes_on_with_the_same_data(finished, model, clips, tmp_path, capsys):
    run = tmp_path / "run"
    train(settings_for(model, run), clips)
    checkpoints = Checkpoints(run, 2)
    checkpoints._manager.delete(6)
    checkpoints.close()
    train(settings_for(model, run, mesh={"data": 1, "fsdp": 4, "tensor": 2}), clips)
    assert "going on after step 4" in capsys.readouterr().out
    # Sums in another order.
    np.testing.assert_allclose(list(losses(run).values()), list(losses(finished).values()), rtol=1e-4)


def test_epochs_become_steps(model, clips, tmp_path, capsys):
    train(settings_for(model, tmp_path / "run", train={"steps": 0, "epochs": 3.0, "rows": 8}), clips)
    out = capsys.readouterr().out
    rows = int(out.split("an epoch: 12 clips, ")[1].split(" tokens in ")[1].split(" rows")[0])
    assert max(losses(tmp_path / "run")) == int(np.ceil(3 * rows / 8))


def test_nothing_is_learned_from_nan(model, clips, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"the loss became (nan|inf) at step \d+; lower optimizer.learning_rate"):
        train(settings_for(model, tmp_path / "run", optimizer={"learning_rate": 1e30, "clip": 0.0}), clips)


def test_refusals(finished, model, clips, tmp_path):
    with pytest.raises(UserError, match=r"made with other settings \(optimizer.learning_rate was 0.01\)"):
        train(settings_for(model, finished, optimizer={"learning_rate": 1e-3}), clips)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(UserError, match="already holds something that is no training run"):
        train(settings_for(model, tmp_path / "letters"), clips)
    assert (tmp_path / "letters" / "dear.txt").read_text() == "dear"
    with pytest.raises(UserError, match="holds no model"):
        train(settings_for(tmp_path / "nothing", tmp_path / "run"), clips)
    with pytest.raises(UserError, match="train.rows=6 does not divide over mesh.data x mesh.fsdp = 4"):
        train(settings_for(model, tmp_path / "run", train={"rows": 6}), clips)
    with pytest.raises(UserError, match="raise data.max_length"):
        train(settings_for(model, tmp_path / "run", data={"max_length": 32}), clips)
    assert not (tmp_path / "run").exists()
