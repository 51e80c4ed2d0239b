"""The loop: it learns, writes what it says it writes, goes on after any end, and refuses what
cannot work.
"""

import errno
import fcntl
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import soundfile
from tiny_run import lines_of, losses, make_clips, make_model, settings_for

from llasa_jax.convert import model_folder
from llasa_jax.demo.tiny import make_tiny_codec
from llasa_jax.errors import UserError
from llasa_jax.model.sharding import make_mesh
from llasa_jax.train import loop as train_module
from llasa_jax.train import prepare, run_folder
from llasa_jax.train.loop import train
from llasa_jax.train.metrics import Metrics
from llasa_jax.train.step import TrainStep


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def clips():
    return [make_clips()]


@pytest.fixture(scope="module")
def finished(model, clips, tmp_path_factory):
    return train(settings_for(model, tmp_path_factory.mktemp("runs") / "whole"), clips, clips)


def test_it_learns_and_says_so(finished):
    lines = lines_of(finished)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    always = {"step", "loss", "accuracy", "grad_norm", "targets", "codes", "fill", "learning_rate"}
    assert set(steps[0]) == always
    # Nobody knows a CPU's peak, so there is no share of it.
    assert set(steps[1]) == always | {"tokens_per_second", "speech_hours_per_hour", "data_wait"}
    for line in steps:
        # every clip has a start and an end marker beside its codes
        assert 0 < line["targets"] - line["codes"] <= 2 * 12
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    validated = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validated] == [3, 6]
    assert set(validated[0]) == {
        "step",
        "validation_loss",
        "validation_accuracy",
        "validation_code_top1_accuracy",
        "validation_code_top10_accuracy",
    }
    assert list((finished / "tensorboard").glob("events.*"))
    assert model_folder.saved_steps(finished) == [4, 6]


def test_a_run_is_a_model(finished, model):
    config, source = model_folder.read_description(finished)
    assert config == model_folder.read_description(model)[0]
    assert source["base_model"] == "tiny"
    assert source["prompt"]["date"] == "26 Jul 2024"
    assert (finished / "hf" / "tokenizer.json").read_bytes() == (
        model / "hf" / "tokenizer.json"
    ).read_bytes()
    one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    latest, older = (
        model_folder.load_params(finished, one, np.float32, step) for step in (None, 4)
    )
    assert np.abs(latest["embed"] - older["embed"]).max() > 0
    with pytest.raises(UserError, match="has no checkpoint of step 5; it has 4, 6"):
        model_folder.load_params(finished, one, np.float32, 5)


def test_the_same_command_again_does_nothing_more(finished, model, clips, capsys):
    before = losses(finished)
    train(settings_for(model, finished), clips, clips)
    assert "going on after step 6" in capsys.readouterr().out
    assert losses(finished) == before


def test_sigterm_saves_and_the_same_command_goes_on(finished, model, clips, tmp_path, monkeypatch):
    real_place, count = TrainStep.place, iter(range(100))

    def place(*args):
        if next(count) == 3:  # the batch of step 4, which is not made then
            os.kill(os.getpid(), signal.SIGTERM)
        return real_place(*args)

    monkeypatch.setattr(TrainStep, "place", place)
    settings = settings_for(model, tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        train(settings, clips)
    assert stop.value.code == 128 + signal.SIGTERM
    assert model_folder.saved_steps(tmp_path / "run") == [2, 3]
    monkeypatch.setattr(TrainStep, "place", real_place)
    train(settings, clips)
    assert losses(tmp_path / "run") == losses(finished)


def test_sigterm_ends_a_validation(model, clips, tmp_path, monkeypatch):
    real_place, count = TrainStep.place, iter(range(100))

    def place(*args):
        if next(count) == 3:  # the first of the validation's batches after step 3
            os.kill(os.getpid(), signal.SIGTERM)
        return real_place(*args)

    monkeypatch.setattr(TrainStep, "place", place)
    with pytest.raises(SystemExit):
        train(settings_for(model, tmp_path / "run"), clips, [make_clips(60)])
    assert next(count) == 4
    assert model_folder.saved_steps(tmp_path / "run") == [2, 3]
    assert not any("validation_loss" in line for line in lines_of(tmp_path / "run"))


def test_a_damaged_checkpoint_is_passed_over(finished, model, clips, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "checkpoints" / "6" / "data" / "metadata").write_text('{"streams')
    with pytest.warns(UserWarning, match="checkpoint of step 6 is damaged"):
        train(settings_for(model, run), clips, [clips[0][:3]])
    assert losses(run) == losses(finished)
    assert model_folder.saved_steps(run) == [4, 6]


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [
        pytest.param(8, {"data": 1, "fsdp": 4, "tensor": 2}, marks=pytest.mark.soak),
        (4, {"data": 1, "fsdp": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_another_mesh_goes_on_with_the_same_data(
    finished, model, clips, tmp_path, capsys, monkeypatch, devices, mesh
):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "6")
    monkeypatch.setattr(
        prepare,
        "make_mesh",
        lambda *shape, **more: make_mesh(*shape, **more, devices=jax.devices()[:devices]),
    )
    train(settings_for(model, run, mesh=mesh), clips, [clips[0][:3]])
    assert "going on after step 4" in capsys.readouterr().out
    # Sums in another order.
    np.testing.assert_allclose(
        list(losses(run).values()), list(losses(finished).values()), rtol=1e-4
    )
    assert [line["targets"] for line in lines_of(run) if "loss" in line] == [
        line["targets"] for line in lines_of(finished) if "loss" in line
    ]


def test_state_goes_to_the_host_and_back_between_checkpoints(
    finished, model, clips, tmp_path, capsys
):
    run = tmp_path / "run"
    train(settings_for(model, run, optimizer={"offload": True}), clips, clips)
    # The same arithmetic, which the compiler fuses otherwise.
    np.testing.assert_allclose(
        list(losses(run).values()), list(losses(finished).values()), rtol=1e-5
    )
    for offload in (True, False):
        shutil.rmtree(run / "checkpoints" / "6")
        train(settings_for(model, run, optimizer={"offload": offload}), clips, clips)
        assert "going on after step 4" in capsys.readouterr().out
        np.testing.assert_allclose(
            list(losses(run).values()), list(losses(finished).values()), rtol=1e-5
        )


def test_epochs_become_steps(model, clips, tmp_path, capsys):
    train(
        settings_for(model, tmp_path / "run", train={"steps": 0, "epochs": 3.0, "rows": 8}), clips
    )
    out = capsys.readouterr().out
    rows = int(out.split("an epoch: 12 clips, ")[1].split(" tokens in ")[1].split(" rows")[0])
    assert max(losses(tmp_path / "run")) == int(np.ceil(3 * rows / 8))


@pytest.mark.filterwarnings("ignore:the loss is")
def test_nothing_is_learned_from_nan(model, clips, tmp_path, monkeypatch):
    with pytest.raises(
        UserError,
        match=r"the (loss|grad_norm) became (nan|inf) at step \d+; lower optimizer.learning_rate",
    ):
        train(
            settings_for(
                model,
                tmp_path / "run",
                optimizer={"name": "sgd", "learning_rate": 99.0, "clip": 0.0},
            ),
            clips,
        )
    for step in model_folder.saved_steps(tmp_path / "run"):
        saved = model_folder.load_params(
            tmp_path / "run", make_mesh(1, 1, 1, devices=jax.devices()[:1]), np.float32, step
        )
        assert np.isfinite(saved["embed"]).all()


def test_refusals(finished, model, clips, tmp_path):
    with pytest.raises(
        UserError, match=r"made with other settings \(optimizer.learning_rate was 0.01\)"
    ):
        train(settings_for(model, finished, optimizer={"learning_rate": 1e-3}), clips)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(UserError, match="already holds something that is no training run"):
        train(settings_for(model, tmp_path / "letters"), clips)
    assert (tmp_path / "letters" / "dear.txt").read_text() == "dear"
    with pytest.raises(UserError, match="holds no model"):
        train(settings_for(tmp_path / "nothing", tmp_path / "run"), clips)
    with pytest.raises(
        UserError, match="train.rows=6 does not divide over mesh.data x mesh.fsdp = 4"
    ):
        train(settings_for(model, tmp_path / "run", train={"rows": 6}), clips)
    with pytest.raises(UserError, match="raise data.max_length"):
        train(settings_for(model, tmp_path / "run", data={"max_length": 32}), clips)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="train.keep_best needs a validation loss"):
        train(settings_for(model, tmp_path / "run", train={"keep_best": 1}), clips)
    with pytest.raises(
        UserError, match="raise data.max_length, or choose another data.validation_split"
    ):
        train_module._validate(1, None, {}, {}, [], None)


def test_two_processes_do_not_share_a_run(finished, model, clips):
    with (finished / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training in .*; wait for its end"):
            train(settings_for(model, finished), clips, [clips[0][:3]])


def test_killed_while_the_folder_is_made_it_starts_again(model, clips, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    for name in ("write_whole", "take_lock"):
        monkeypatch.setattr(run_folder, name, killed)
        with (
            pytest.raises(KeyboardInterrupt),
            run_folder.claimed(tmp_path / "run", settings_for(model, tmp_path / "run")),
        ):
            pass
        monkeypatch.undo()
    monkeypatch.setattr(model_folder, "copy_description", killed)
    with (
        pytest.raises(KeyboardInterrupt),
        run_folder.claimed(tmp_path / "run", settings_for(model, tmp_path / "run")),
    ):
        pass
    monkeypatch.undo()
    with run_folder.claimed(tmp_path / "run", settings_for(model, tmp_path / "run")):
        assert model_folder.read_description(tmp_path / "run")


def test_it_learns_on_where_its_numbers_cannot_be_written(
    finished, model, clips, tmp_path, monkeypatch
):
    class Full:
        def write(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

        write_event = flush = write

        def close(self):
            pass

    make = Metrics.__init__

    def on_a_full_disk(self, *arguments):
        make(self, *arguments)
        self._file.close()
        self._tensorboard._file.close()
        self._file = self._tensorboard._file = Full()

    monkeypatch.setattr(Metrics, "__init__", on_a_full_disk)
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "6")
    with pytest.warns(
        UserWarning, match="the run's numbers cannot be written .*training goes on without"
    ) as warned:
        train(settings_for(model, run), clips, [clips[0][:3]])
    assert len([w for w in warned if "numbers" in str(w.message)]) == 1
    assert model_folder.saved_steps(run) == [4, 6]


def test_the_best_is_kept_and_samples_are_spoken(model, clips, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        prepare,
        "make_mesh",
        lambda *shape, **more: make_mesh(1, 1, 2, devices=jax.devices()[:2]),
    )
    codec = make_tiny_codec(tmp_path / "codec")
    log = {
        "samples": ["word 1", "word 2"],
        "samples_every": 9,
        "samples_speaker": "ada",
        "codec": str(codec),
        "every": 1,
    }
    # Learned by heart, so that what it has not seen gets worse.
    train_settings = {"steps": 4, "save_every": 1, "validate_every": 4, "keep": 1, "keep_best": 1}
    unseen = make_clips(30)[-4:]
    run = train(
        settings_for(
            model, tmp_path / "run", log=log, train=train_settings, optimizer={"learning_rate": 0.5}
        ),
        clips,
        [unseen],
    )
    validated = {
        line["step"]: line["validation_loss"] for line in lines_of(run) if "validation_loss" in line
    }
    assert set(validated) == {1, 2, 3, 4}
    best = min(validated, key=validated.get)
    assert best != 4
    assert model_folder.saved_steps(run) == [best, 4]
    assert (
        f"the best checkpoint is that of step {best}, with a validation loss of"
        f" {validated[best]:.4f}" in capsys.readouterr().out
    )
    spoken = sorted(path.name for path in (run / "samples").iterdir())
    assert spoken
    assert set(spoken) <= {f"000004_{number}.wav" for number in (0, 1)}
    wave, rate = soundfile.read(run / "samples" / spoken[0])
    assert rate == 16_000
    assert len(wave) % 320 == 0
    (events,) = (run / "tensorboard").iterdir()
    assert events.read_bytes().count(b"sample_") == len(spoken)
