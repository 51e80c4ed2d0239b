"""What the page makes and trains, without a browser: names, commands and processes."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from llasa_jax.cli import main, new_parser
from llasa_jax.data.manifest import read_manifest
from llasa_jax.errors import UserError
from llasa_jax.serve import work as module
from llasa_jax.serve.work import LAYOUTS, Command, Job, Plan, Work
from llasa_jax.speech.audio import write_audio
from llasa_jax.train.parsing import parse_settings

MANIFEST, BESIDE = list(LAYOUTS)[:2]
# Says its arguments; with "wait" it saves at SIGTERM, as training does.
PROGRAM = """
import json, signal, sys, time
print(json.dumps(sys.argv[1:]), flush=True)
if "wait" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("saved", flush=True)))
    print("ready", flush=True)
    time.sleep(60)
sys.exit(3 if "fail" in sys.argv else 0)
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PROGRAM", (sys.executable, "-c", PROGRAM))
    root = tmp_path / "root"
    for name in ("a", "b"):
        (root / "voice").mkdir(parents=True, exist_ok=True)
        write_audio(root / "voice" / f"{name}.wav", np.full(8000, 0.1, np.float32), 16_000)
    (root / "voice" / "a.txt").write_text("what a says\n")
    (tmp_path / "secret").mkdir()
    return Work(root, "hub/model", "hub/codec")


def test_only_what_lies_below_the_root_is_named(work, tmp_path):
    (work.root / "link").symlink_to(tmp_path / "secret")
    assert work.inside("voice", "the folder") == work.root / "voice"
    secret = str(tmp_path / "secret")
    for name in ("", "../secret", "voice/../../secret", secret, "link", "none", "a\0b", "x" * 5000):
        with pytest.raises(UserError, match="is not there; give a name below"):
            work.inside(name, "the folder")
        with pytest.raises(UserError, match="is not there; give a name below"):
            work.make_dataset("mine", name, BESIDE)
    assert not work.datasets.exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "-x", "a b", "x" * 200])
def test_new_names_are_plain(work, name):
    with pytest.raises(UserError, match="is no name of a dataset"):
        work.make_dataset(name, "voice", BESIDE)
    with pytest.raises(UserError, match="is no name of a run"):
        work.train(Plan(name, "mine"))
    with pytest.raises(UserError, match="is no name of a dataset"):
        work.report(name)


def test_a_folder_becomes_a_dataset(work):
    with pytest.raises(UserError, match="none of manifest.jsonl"):
        work.make_dataset("mine", "voice", MANIFEST)
    with pytest.raises(UserError, match="is no layout"):
        work.make_dataset("mine", "voice", "Nonsense")
    with pytest.raises(UserError, match="0 to below 1"):
        work.make_dataset("mine", "voice", BESIDE, 1.0)
    job = work.make_dataset("mine", "voice", BESIDE, 0.1)
    assert job.wait() == "done", job.log()
    assert job.notice.startswith("1 clips; 1 are left out, the first because")
    (clip,) = read_manifest(work.datasets / "mine.jsonl")
    assert (clip.id, clip.text, clip.audio) == ("a", "what a says", work.root / "voice" / "a.wav")
    # The commands are those of the command line, which takes them.
    said = [*job.log().splitlines(), (work.datasets / "mine.json").read_text()]
    encode, report, doctor = (new_parser().parse_args(json.loads(words)) for words in said)
    assert (encode.codec, encode.validation_share) == ("hub/codec", 0.1)
    assert encode.manifest == work.datasets / "mine.jsonl"
    assert report.dataset == encode.out == work.datasets / "mine"
    settings = parse_settings([f"--config={doctor.config[0]}"])
    assert settings.data.path == str(encode.out)
    assert settings.data.validation_split == "validation"
    (work.datasets / "mine.json").write_text('[{"severity": "ok"}]')
    assert work.findings("mine") == [{"severity": "ok"}]
    assert work.report("mine") == ""
    assert work.made_datasets() == []
    (work.root / "voice" / "manifest.jsonl").write_text("{}")
    assert work.make_dataset("own", "voice", MANIFEST).wait() == "done"
    assert f"--manifest={work.root}/voice/manifest.jsonl" in work.making.log()


@pytest.fixture
def dataset(work):
    work.make_dataset("mine", "voice", BESIDE).wait()
    (work.datasets / "mine").mkdir()


def test_a_training_has_the_settings_of_the_page(work, dataset):
    (work.root / "recipes").mkdir()
    (work.root / "recipes" / "small.yaml").write_text(yaml.dump({"train": {"rows": 2, "steps": 9}}))
    (work.root / "models" / "own").mkdir(parents=True)
    (work.root / "models" / "own" / "config.json").write_text("{}")
    assert work.audio_folders() == ["models", "models/own", "recipes", "voice"]
    assert work.models() == [module.SERVED, "models/own"]
    assert work.recipes() == ["recipes/small.yaml"]
    plan = Plan("first", "mine", "models/own", "recipes/small.yaml", lora_rank=4, every=5)
    job = work.train(Plan(**vars(plan) | {"learning_rate": 0.5, "sample": 'Say "so".'}))
    assert job.wait() == "done"
    command, *words = json.loads(job.log())
    assert command == "train"
    settings = parse_settings(words)
    assert settings.out == str(work.runs / "first")
    assert settings.model.path == str(work.root / "models" / "own")
    assert settings.data.path == str(work.datasets / "mine")
    train, log = settings.train, settings.log
    assert (train.rows, train.steps, train.save_every, log.samples_every) == (2, 9, 5, 5)
    assert (settings.lora.rank, settings.optimizer.learning_rate) == (4, 0.5)
    assert (log.codec, log.samples) == ("hub/codec", ['Say "so".'])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dataset": "other"}, "no dataset 'other' was made here"),
        ({"model": "../../model"}, "the model '../../model' is not there"),
        ({"recipe": "/etc/passwd"}, "the recipe '/etc/passwd' is not there"),
        ({"steps": -1}, "train.steps is -1"),
    ],
)
def test_wrong_plans_are_one_sentence(work, dataset, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        work.train(Plan(**{"name": "run", "dataset": "mine"} | changes))
    assert work.training is None


def test_a_job_stops_with_sigterm_and_at_a_failure(work, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("LLASA_JAX_API_KEY", "secret")
    log = tmp_path / "logs" / "x.log"
    job = Job("x", log, [Command(["one", "fail"]), Command(["two"])])
    assert job.wait() == "failed"
    assert "two" not in job.log()
    assert Job("x", log, [Command(["one", "fail"], fine=3), Command(["two"])]).wait() == "done"
    work.training = job = Job("x", log, [Command(["wait"]), Command(["two"])])
    while "ready" not in job.log():
        time.sleep(0.01)
    with pytest.raises(UserError, match="the training x is being made; stop it"):
        work.train(Plan("y", "mine"))
    # In a session of its own: Ctrl-C at the server's terminal does not reach it.
    assert os.getsid(job._process.pid) != os.getsid(0)
    environment = Path(f"/proc/{job._process.pid}/environ").read_bytes()
    assert b"LLASA_JAX_API_KEY" not in environment
    job.stop()
    assert job.wait() == "stopped"
    assert job.log().endswith("saved")
    assert work.train(Plan("y", "mine")).wait() == "done"


def test_the_tab_needs_the_page_and_a_folder(tmp_path, capfd):
    assert main(["serve", "model", f"--work={tmp_path}"]) == 2
    assert "--runs and --work are of the page; add --page" in capfd.readouterr().err
    assert main(["serve", "model", "--page", f"--work={tmp_path / 'none'}"]) == 2
    assert "none: no such folder; make it, or give another --work" in capfd.readouterr().err
