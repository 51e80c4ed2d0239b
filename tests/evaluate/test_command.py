"""`llasa-jax evaluate` on a run with two checkpoints of random weights."""

import json

import numpy as np
import pytest
from places import SPEECH
from tiny_run import make_clips, make_model, settings_for

from llasa_jax.cli import main
from llasa_jax.cli.evaluate import SCORERS
from llasa_jax.data.builder import write_dataset
from llasa_jax.data.records import record_of
from llasa_jax.demo.tiny import make_tiny_codec
from llasa_jax.errors import UserError
from llasa_jax.evaluate.checkpoints import chosen_steps, texts_fingerprint
from llasa_jax.evaluate.scorers import DEFAULT_SCORERS
from llasa_jax.evaluate.texts import Item
from llasa_jax.generate import speaker
from llasa_jax.train.loop import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    make_model(folder / "model")
    make_tiny_codec(folder / "codec")
    settings = settings_for(
        folder / "model",
        folder / "run",
        train={"steps": 4, "save_every": 2, "keep": 9},
    )
    train(settings, [make_clips(4)])
    records = (record_of(clip, clip.codes) for clip in make_clips(4))
    write_dataset(folder / "records", {"held": records}, {})
    audio = f"ref|The kettle is on.|{SPEECH / 'ada_02.flac'}|"
    (folder / "meta.lst").write_text(f"a{audio[3:]}the dog\nb{audio[3:]}a fox\n")
    return folder


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    """No long speech of a model that does not know when to stop."""
    monkeypatch.setattr(speaker, "plausible_limit", lambda text: 10)


def command(folder, out, *options):
    return [
        *("evaluate", str(folder / "run"), "--out", str(out), "--codec", str(folder / "codec")),
        *("--scorer", "levels", "--dtype", "float32", *options),
    ]


def test_checkpoints_on_held_out_records(folder, tmp_path, capsys):
    held, out = f"{folder / 'records'}:held", tmp_path / "out"
    assert main(command(folder, out, "--texts", held, "--steps", "all")) == 0
    said = capsys.readouterr().out
    assert "2: 4 of 4 texts to speak" in said
    results = json.loads((out / "results.json").read_text())
    assert [each["checkpoint"] for each in results["checkpoints"]] == ["ceiling", "2", "4"]
    assert all(each["numbers"]["seconds"]["clips"] == 4 for each in results["checkpoints"])
    seconds = results["checkpoints"][0]["numbers"]["seconds"]["mean"]
    assert seconds == pytest.approx(np.mean([len(clip.codes) for clip in make_clips(4)]) / 50)
    assert (out / "index.html").stat().st_size > 10_000
    rows = (out / "rows.jsonl").read_bytes()
    assert main(command(folder, out, "--texts", held, "--steps", "all")) == 0
    assert "4: 0 of 4 texts to speak" in capsys.readouterr().out
    assert (out / "rows.jsonl").read_bytes() == rows
    assert main(command(folder, out, "--texts", held, "--seed", "1")) == 2
    assert "holds an evaluation with another sampling" in capsys.readouterr().err


def test_seed_tts_eval_lists_clone_the_prompt(folder, tmp_path):
    out = tmp_path / "out"
    assert main(command(folder, out, "--texts", str(folder / "meta.lst"))) == 0
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert sorted((row["checkpoint"], row["id"]) for row in rows) == [("4", "a"), ("4", "b")]


def test_what_is_wrong_is_said_in_a_sentence(folder, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("word\n")
    texts = ("--texts", str(tmp_path / "t.txt"))
    for options, said in (
        (("--texts", "no.txt"), "no such list of texts"),
        ((*texts, "--steps", "3"), "has no checkpoint of step 3; it has 2, 4"),
        ((*texts, "--steps", "last"), "give all, or steps such as 100,200"),
        ((*texts, "--scorer", "hearing"), "there is no scorer 'hearing'"),
        ((*texts, "--scorer", "levels"), "levels and levels both measure head"),
        ((*texts, "--language", "elvish"), "the language 'elvish' is not known"),
        ((*texts, "--codec", "nowhere"), "no such codec folder"),
    ):
        assert main(command(folder, tmp_path / "out", *options)) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="is no run with checkpoints; leave --steps out"):
        chosen_steps(folder / "model", "all")
    assert chosen_steps(folder / "model", "") == {"model": None}
    assert chosen_steps(folder / "run", "4,2") == {"2": 2, "4": 4}


def test_lists_have_fingerprints():
    items = [Item("a", "b"), Item("a", "b", "c"), Item("a", "b", recording=np.arange(3))]
    items += [Item("a", "b", recording=np.arange(4))]
    assert len({texts_fingerprint([item]) for item in items}) == 4
    assert SCORERS == DEFAULT_SCORERS
