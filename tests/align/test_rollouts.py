"""GRPO's loop with a model of random weights, killed and not.

`python tests/align/test_rollouts.py FOLDER OUT [WORD]` trains, and kills itself, as `kill -9` does,
when it first opens a file with WORD in its name.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import lines_of, make_model, settings_for

from llasa_jax.align import rollouts
from llasa_jax.align.journal import unpacked
from llasa_jax.align.rewards import reward_of
from llasa_jax.align.rollouts import Place, Rollouts, check_fit
from llasa_jax.align.round import Round
from llasa_jax.align.settings import AlignSettings, GrpoSettings, GuardSettings, RewardSettings
from llasa_jax.data.batching import BatchShape
from llasa_jax.demo.tiny import make_tiny_codec
from llasa_jax.errors import UserError
from llasa_jax.evaluate.scorers import Scores
from llasa_jax.evaluate.texts import read_items
from llasa_jax.generate.line import Line
from llasa_jax.generate.speaker import Said
from llasa_jax.model.settings import LoraSettings
from llasa_jax.train.loop import train

REPOSITORY = Path(__file__).parents[2]
LOW = [RewardSettings("low", "exp")]
GUARDS = [GuardSettings("other", "low", most=0.5)]


class LowVoices:
    """Scorers in this process: `low` is the mean level, the lower the better."""

    higher_is_better = {"low": False}

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, waves, texts, references):
        future = Future()
        numbers = {"low": np.array([np.abs(wave).mean(dtype=np.float64) for wave in waves])}
        future.set_result(Scores(numbers, list(texts)))
        return future


def grpo_settings(folder, out, how=""):
    """Two updates of each round, and checkpoints in the middle of one; `how` may be ahead, or still
    for weights that do not change.
    """
    settings = settings_for(
        folder / "model",
        out,
        train={"steps": 6, "rows": 8, "save_every": 3},
        optimizer={"learning_rate": 1e-30 if how == "still" else 1e-2, "warmup_ratio": 0.0},
        mesh={"data": 1, "fsdp": -1, "tensor": 1},
        data={"max_length": 96, "path": str(folder / "texts.txt")},
        log={"codec": str(folder / "codec"), "tensorboard": False},
    )
    align = GrpoSettings(
        samples=4,
        texts=2,
        updates=2,
        kl=0.1,
        rewards=LOW,
        guards=GUARDS,
        unstopped=0.0,
        audio_every=2,
        max_seconds=0.16,
        ahead=how == "ahead",
    )
    lora = LoraSettings(rank=4, dropout=0.0)
    return dataclasses.replace(settings, lora=lora, align=AlignSettings("grpo", grpo=align))


def main(folder, out, word="", how=""):
    def watch(what, details):
        if word and what == "open" and word in str(details[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    rollouts.Scoring = LowVoices
    sys.addaudithook(watch)
    settings = grpo_settings(Path(folder), out, how)
    train(settings, [read_items(settings.data.path)])


@pytest.mark.soak
@pytest.mark.parametrize("how", ["", "ahead"])
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path, how):
    make_model(tmp_path / "model")
    make_tiny_codec(tmp_path / "codec")
    (tmp_path / "texts.txt").write_text("the dog\na fox\nthe kettle is on\na door\n")
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests/fixtures")))
    environment = os.environ | {"PYTHONPATH": paths, "XLA_FLAGS": ""}

    def run(out, word="", how=how):
        command = [sys.executable, __file__, str(tmp_path), str(tmp_path / out), word, how]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == (-signal.SIGKILL if word else 0), done.stderr[-2000:]
        return tmp_path / out

    whole = run("whole")
    run("killed", ".000001.")  # the log of the second round, before any checkpoint
    run("killed", ".000002.")  # that of the third; the checkpoint is of the middle of the second
    killed = run("killed")

    logs = sorted((whole / "rollouts").glob("*.jsonl"))
    assert [log.name for log in logs] == ["000000.jsonl", "000001.jsonl", "000002.jsonl"]
    for log in logs:
        assert (killed / "rollouts" / log.name).read_bytes() == log.read_bytes()
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        found = np.array([row["advantage"] for row in rows]).reshape(2, 4)
        np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-9)
        rewards = np.array([row["reward"] for row in rows]).reshape(2, 4)
        np.testing.assert_array_equal(found.argmax(axis=1), rewards.argmax(axis=1))
        low = np.array([row["scores"]["low"] for row in rows])
        np.testing.assert_allclose(rewards.ravel(), np.exp(-low))
        assert [row["scores"]["other_low"] for row in rows] == low.tolist()
        assert all(1 <= len(unpacked(row["codes"])) <= 8 for row in rows)
    assert len(list((whole / "rollouts/000002").glob("*.wav"))) == 8
    assert not (whole / "rollouts/000001").exists()

    timed = {"tokens_per_second", "speech_hours_per_hour", "data_wait"}
    steps, others = (
        [
            {name: value for name, value in line.items() if name not in timed}
            for line in lines_of(run)
            if "loss" in line or "reward" in line
        ]
        for run in (whole, killed)
    )
    assert steps == others
    losses = [line for line in steps if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2, 3, 4, 5, 6]
    # The first model is its own reference: two programs, so not to the last bit.
    assert losses[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert losses[0]["kl"] < losses[-1]["kl"]
    # The second update of a round finds better than chance what the first has learned of it.
    assert losses[1]["loss"] < losses[0]["loss"]
    if how:  # the first weights have spoken the second round too
        first, second = (logs[number].read_bytes() for number in (0, 1))
        still = run("still", how="still") / "rollouts"
        assert (still / "000000.jsonl").read_bytes() == first
        assert (still / "000001.jsonl").read_bytes() == second


@pytest.mark.parametrize(
    ("ahead", "order"),
    [
        (False, "speak 0 rate 0 step step speak 1 rate 1 step step speak 2 rate 2 step step"),
        (True, "speak 0 speak 1 rate 0 step step speak 2 rate 1 step step rate 2 step step"),
    ],
)
def test_when_rounds_are_spoken(ahead, order):
    done = []
    made = object.__new__(Rollouts)
    made._settings = GrpoSettings(updates=2, ahead=ahead)
    made._scorers = ExitStack()
    made._place, made._next, made.last = Place(), None, 3
    made._speak = lambda number: done.append(f"speak {number}") or number_of(number)
    made._rated = lambda spoken: done.append(f"rate {spoken.number}") or {"x": np.zeros(1)}
    for _ in range(6):
        next(made)
        state = json.loads(json.dumps(made.get_state()))
        made.set_state(state)  # as a checkpoint after each step has it
        done.append("step")
    assert " ".join(done) == order


def number_of(number):
    """A round with this number, with a speech of three codes."""
    said = Said(np.zeros(0, np.uint16), [np.arange(3, dtype=np.uint16)], True, 4, -0.5)
    return Round(number, {7: [said]}, np.full((1, 2), 0.1, np.float32))


def test_a_round_in_a_checkpoint():
    found = Round.read(json.loads(json.dumps(number_of(2).written())))
    ((at, (said,)),) = found.said.items()
    assert (found.number, at, said.stopped, said.tokens, said.logprob) == (2, 7, True, 4, -0.5)
    assert (said.prompt.size, said.pieces[0].tolist()) == (0, [0, 1, 2])
    np.testing.assert_array_equal(found.old, np.full((1, 2), 0.1, np.float32))


def test_rewards():
    scores = {"cer": np.array([0.0, 0.5, np.nan]), "similarity": np.array([0.8, 0.8, 0.8])}
    stopped, pace = np.array([True, True, False]), np.array([1.0, 2 * np.e, 1.0])
    settings = GrpoSettings(pace=0.25)
    found = reward_of(settings, scores, stopped, pace)
    heard = 1 - np.tanh(1.5)
    assert found[0] == pytest.approx(2 / (1 + 1 / 0.8))
    assert found[1] == pytest.approx(2 / (1 / heard + 1 / 0.8) - 0.25)
    assert found[2] == pytest.approx(2 / (1e3 + 1 / 0.8) - 1)
    parts = [RewardSettings("cer", "exp", 2.0, weight=3.0), RewardSettings("similarity")]
    settings = GrpoSettings(rewards=parts, combine="mean")
    found = reward_of(settings, scores, stopped, np.ones(3))
    np.testing.assert_allclose(found, [(3 + 0.8) / 4, (3 / np.e + 0.8) / 4, 0.2 - 1])


def test_guards_stop_a_run_that_learns_nothing_or_goes_astray():
    def rounds(flat, stopped, pace, **numbers):
        numbers |= {"stopped": stopped, "pace": pace}
        guards = (
            [GuardSettings(least=0.1, most=0.6)] if numbers.keys() > {"stopped", "pace"} else []
        )
        settings = GrpoSettings(patience=3, guards=guards)
        made = SimpleNamespace(_settings=settings, _place=Place(), numbers=numbers, _folder=Path())
        for _ in range(3):
            Rollouts._guard(made, flat)

    rounds(0.5, 0.9, 1.0)
    with pytest.raises(UserError, match="in 3 rounds all speeches of each text had one reward"):
        rounds(1.0, 0.9, 1.0)
    for stopped, pace in ((0.1, 1.0), (0.9, 5.0), (0.9, 0.2)):
        with pytest.raises(UserError, match="for 3 rounds speech has gone astray"):
            rounds(0.5, stopped, pace)
    rounds(0.5, 0.9, 1.0, score_levels_silence=0.3)
    for name, value in (("silence", 0.7), ("silence", 0.05), ("another", 0.3)):
        with pytest.raises(UserError, match="its silence by levels is (0.7|0.05|nan); lower"):
            rounds(0.5, 0.9, 1.0, **{f"score_levels_{name}": value})


def test_a_guard_is_measured_beside_the_reward():
    made = SimpleNamespace(
        _settings=GrpoSettings(rewards=LOW, guards=GUARDS),
        _items=[SimpleNamespace(text="hello")],
        _references=SimpleNamespace(of=lambda at: None),
        _speaker=SimpleNamespace(sound=lambda said, _: SimpleNamespace(wave=said)),
        _scoring=LowVoices(),
        _guards={"other": LowVoices()},
    )
    waves = [np.full(4, 0.25), np.full(4, 0.5)]
    scores = Rollouts._scores(made, Rollouts._begin(made, 0, waves))
    assert scores.of(1) == {"low": 0.5, "other_low": 0.5}
    made._settings = GrpoSettings(guards=[GuardSettings("other", "silence")])
    with pytest.raises(UserError, match="names silence, which other does not measure; it measures"):
        Rollouts._scores(made, Rollouts._begin(made, 0, waves))
    with pytest.raises(UserError, match=r"align.grpo.guards.*least is above"):
        GuardSettings(least=1.0, most=0.0).check("align.grpo.guards")


def test_what_is_wrong_is_said_in_a_sentence(prompter, tmp_path):
    lines = [Line("hello", id="a"), Line("hello " * 50, id="b")]
    with pytest.raises(UserError, match="as the text b may take, and a step has room for 4"):
        check_fit(GrpoSettings(), lines, prompter, BatchShape(1, 4, 4096), 320)
    with pytest.raises(UserError, match="there are 1 texts, and align.grpo.texts speaks 4"):
        (made := Rollouts.__new__(Rollouts)).__init__(
            GrpoSettings(), [None], prompter, None, None, tmp_path, 0
        )
    made.close()  # as Grain does when it is collected
    check_fit(GrpoSettings(max_seconds=2.0), lines, prompter, BatchShape(1, 4, 4096), 320)
    (tmp_path / "codec").mkdir()
    settings = grpo_settings(tmp_path, tmp_path / "run")
    for group, change, said in (
        ("data", {"mode": "online"}, "whose data are texts to speak"),
        ("log", {"codec": ""}, "align.loss grpo needs log.codec"),
        ("align", {"loss": "supervised"}, "align.grpo is set, but align.loss is supervised"),
    ):
        with pytest.raises(UserError, match=said):
            settings_with(settings, group, change)


def settings_with(settings, group, change):
    changed = dataclasses.replace(getattr(settings, group), **change)
    return dataclasses.replace(settings, **{group: changed})


if __name__ == "__main__":
    main(*sys.argv[1:])
