"""A run is known by what it is, not by where it lies: it, its model and its data may be moved.
Older runs lack newer settings. Whatever is wrong with its folder is one sentence.
"""

import dataclasses
import errno
import json
import os
import shutil

import pytest
import torch
import yaml
from reference import hf_llama
from tiny_run import losses, make_clips, make_model, settings_for

from llasa_jax.convert.model_folder import saved_steps
from llasa_jax.data.settings import SourceSettings
from llasa_jax.errors import UserError
from llasa_jax.train import run_folder
from llasa_jax.train.loop import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def clips():
    return [make_clips()]


@pytest.fixture(scope="module")
def whole(model, clips, tmp_path_factory):
    return train(settings_for(model, tmp_path_factory.mktemp("runs") / "whole"), clips)


@pytest.fixture
def half(whole, tmp_path):
    """A run that has four of its six steps."""
    run = shutil.copytree(whole, tmp_path / "half")
    shutil.rmtree(run / "checkpoints" / "6")
    return run


def test_run_model_and_data_may_be_moved(whole, half, model, clips, tmp_path, capsys):
    moved = settings_for(
        shutil.copytree(model, tmp_path / "a copy"),
        half.rename(tmp_path / "elsewhere"),
        data={"path": "another place"},
    )
    train(moved, clips)
    assert "going on after step 4" in capsys.readouterr().out
    assert losses(tmp_path / "elsewhere") == losses(whole)


def test_a_setting_that_an_older_run_lacks_had_its_default(half, model):
    path = half / "settings.yaml"
    before = yaml.safe_load(path.read_text())
    del before["optimizer"]["decay_norms"], before["profile"], before["prompt"]["mask"]
    wanted = settings_for(model, half)
    assert run_folder.changes(before, wanted) == {}
    other = settings_for(model, half, optimizer={"decay_norms": True}, prompt={"mask": "upstream"})
    assert run_folder.changes(before, other) == {
        "optimizer.decay_norms": False,
        "prompt.mask": "clean",
    }


def test_sources_are_compared_one_by_one(model, tmp_path):
    def settings(*sources):
        return settings_for(
            model, tmp_path, data={"path": "", "sources": [SourceSettings(**s) for s in sources]}
        )

    before = dataclasses.asdict(settings({"path": "a"}, {"path": "b", "weight": 0.5}))
    same = settings({"path": "moved"}, {"path": "b", "weight": 0.5})
    assert run_folder.changes(before, same) == {}
    heavier = settings({"path": "a"}, {"path": "b", "weight": 0.7})
    assert run_folder.changes(before, heavier) == {"data.sources.1.weight": 0.5}
    fewer = settings({"path": "a"})
    assert run_folder.changes(before, fewer) == {"data.sources": "2 entries"}


@pytest.mark.filterwarnings("ignore:the loss is")
@pytest.mark.slow
def test_other_weights_under_the_path_of_a_hugging_face_checkpoint(clips, tokenizer, tmp_path):
    """The run's own checkpoints do not need them, but it was not made from them."""
    hf = hf_llama(vocab=len(tokenizer))
    hf.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    settings = settings_for(tmp_path / "hf", tmp_path / "run", train={"steps": 2})
    train(settings, clips)
    shutil.copytree(tmp_path / "hf", tmp_path / "copy")
    train(settings_for(tmp_path / "copy", tmp_path / "run", train={"steps": 2}), clips)
    with torch.no_grad():
        hf.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    hf.save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="was begun with another model than the one in"):
        train(settings, clips)


def test_other_data_another_model_and_another_codec_are_refused(half, model, clips, tmp_path):
    other = [
        dataclasses.replace(clip, codes=clip.codes[::-1].copy()) if i == 0 else clip
        for i, clip in enumerate(clips[0])
    ]
    with pytest.raises(UserError, match="was made from other training data"):
        train(settings_for(model, half), [other])
    changed = shutil.copytree(model, tmp_path / "other model")
    tokenizer = changed / "hf" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(UserError, match="was begun with another model than the one in"):
        train(settings_for(changed, half), clips)
    description = json.loads((half / "model.json").read_text())
    description["source"]["codec"] = {"codec": "one", "fingerprint": "aa"}
    (half / "model.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"with codes of one \(fingerprint aa\), not of two \(bb\)"):
        train(settings_for(model, half), clips, codec={"codec": "two", "fingerprint": "bb"})
    assert saved_steps(half) == [4]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xff\xfe broken", "settings.yaml: the run's settings is not UTF-8"),
        (b"a: [1", "settings.yaml: the run's settings is not valid YAML"),
        (b"- 1", "settings.yaml: the run's settings is not an object"),
        (b"", "settings.yaml: the run's settings are empty"),
    ],
)
def test_damaged_settings_are_one_sentence(half, model, clips, content, sentence):
    (half / "settings.yaml").write_bytes(content)
    with pytest.raises(UserError, match=f"{sentence}.*choose another out folder"):
        train(settings_for(model, half), clips)


def test_damaged_metrics_and_description_are_healed(whole, half, model, clips):
    lines = (half / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (half / "metrics.jsonl").write_bytes(b"\xff\xfe\x00 no line\n" + b"[1]\n" + b"".join(lines))
    (half / "model.json").write_bytes(b'{"config": ')
    train(settings_for(model, half), clips)
    assert losses(half) == losses(whole)
    json.loads((half / "model.json").read_text())


def test_folders_that_cannot_be_are_one_sentence(half, model, clips, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("dear")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at all")
    for out in ("file", "file/run", "link"):
        with pytest.raises(UserError, match=str(tmp_path / "file") + "|" + str(tmp_path / "link")):
            train(settings_for(model, tmp_path / out), clips)
    for name in ("metrics.jsonl", ".lock"):
        run = shutil.copytree(half, tmp_path / name.strip("."))
        (run / name).unlink()
        (run / name).mkdir()
        with pytest.raises(UserError, match=f"{name} is a folder, not a file"):
            train(settings_for(model, run), clips)
    run = shutil.copytree(half, tmp_path / "checkpoints is a file")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("dear")
    with pytest.raises(UserError, match="a checkpoint could not be written to .*checkpoints"):
        train(settings_for(model, run), clips)

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(half / "settings.yaml"))

    monkeypatch.setattr(run_folder, "write_whole", read_only)
    with pytest.raises(UserError, match="settings.yaml is on a read-only file system"):
        train(settings_for(model, half), clips)


@pytest.mark.parametrize(
    "name",
    [
        os.fsdecode(b"run[1] a#b?c%20d caf\xe9"),
        # Which of its characters it was.
        pytest.param("run[1]", marks=pytest.mark.soak),
        pytest.param("a#b?c%20d", marks=pytest.mark.soak),
        pytest.param(os.fsdecode(b"caf\xe9"), marks=pytest.mark.soak),
    ],
    ids=ascii,
)
def test_the_same_command_goes_on_in_any_folder(whole, model, clips, tmp_path, name, capsys):
    run = tmp_path / name
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "6")
    for _ in range(2):
        train(settings_for(model, run), clips)
    assert "going on after step 6" in capsys.readouterr().out
    assert losses(run) == losses(whole)
