"""The program's order: what can refuse a run does so before anything large is loaded, and every
dataset is opened once.
"""

import dataclasses
import shutil

import pytest
from tiny_run import make_clips, make_model, settings_for

from llasa_jax import finetune
from llasa_jax.data.builder import write_dataset
from llasa_jax.errors import UserError
from llasa_jax.inspect import doctor
from llasa_jax.runtime.signals import StopSignal
from llasa_jax.train import loop


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "records"
    rows = [
        {name: value for name, value in dataclasses.asdict(clip).items() if name != "num_codes"}
        for clip in make_clips()
    ]
    write_dataset(folder, {"train": rows}, {"codec": "none", "fingerprint": "none"})
    return folder


def never(*_, **__):
    raise AssertionError("too early, or a second time")


def test_checks_come_before_the_codec_and_the_weights(model, records, tmp_path, monkeypatch):
    for name in ("open_encoder", "codec_of"):
        monkeypatch.setattr(finetune, name, never)
    monkeypatch.setattr(loop, "run", never)
    data = {"path": str(records), "doctor": "off"}
    wrong = {
        "train.rows=6 does not divide": settings_for(
            model, tmp_path / "run", data=data, train={"rows": 6}
        ),
        "train.keep_best needs a validation loss": settings_for(
            model, tmp_path / "run", data=data, train={"keep_best": 1}
        ),
        "raise data.max_length": settings_for(
            model, tmp_path / "run", data=data | {"max_length": 32}
        ),
    }
    for sentence, settings in wrong.items():
        with pytest.raises(UserError, match=sentence):
            finetune.finetune(settings, StopSignal())
    shutil.copytree(records, tmp_path / "damaged")
    next((tmp_path / "damaged").glob("*train*")).write_bytes(b"")
    damaged = settings_for(model, tmp_path / "run", data={"path": str(tmp_path / "damaged")})
    with pytest.raises(UserError):
        finetune.finetune(damaged, StopSignal())
    assert not (tmp_path / "run").exists()


def test_every_dataset_is_opened_once(model, records, tmp_path, monkeypatch):
    for name in ("open_utterances", "open_sources"):
        monkeypatch.setattr(doctor, name, never)
    opened, trained = [], []
    real = finetune.open_sources
    monkeypatch.setattr(
        finetune, "open_sources", lambda *given: opened.append(given) or real(*given)
    )
    monkeypatch.setattr(loop, "run", lambda job, *_, **__: trained.append(job))
    settings = settings_for(model, tmp_path / "run", data={"path": str(records), "doctor": "warn"})
    finetune.finetune(settings, StopSignal())
    assert len(opened) == 1
    assert trained[0].clips == 12
