"""Where a run's time goes, on a clock that is set by hand."""

import json

import pytest

from llasa_jax.train import goodput
from llasa_jax.train.goodput import Goodput
from llasa_jax.train.metrics import Metrics
from llasa_jax.train.settings import LogSettings


@pytest.fixture
def clock(monkeypatch):
    clock = {"now": 100.0}
    monkeypatch.setattr(goodput.time, "monotonic", lambda: clock["now"])
    return clock


def test_every_second_is_counted_once(clock):
    spent, waited = Goodput(90.0), {"seconds": 0.0}
    spent.waited = lambda: waited["seconds"]
    with spent.of("validate"):
        clock["now"] += 5
        with spent.of("compile"):
            clock["now"] += 20
    spent.started()
    for step in (1, 2):
        spent.step(step)
        clock["now"] += 30
        waited["seconds"] += 4
    with spent.of("save"):
        clock["now"] += 3
    numbers = spent.numbers()
    assert numbers == {
        "goodput": 52 / 98,
        "seconds_start": 10,
        "seconds_compile": 20,
        "seconds_validate": 5,
        "seconds_wait": 8,
        "seconds_save": 3,
        "seconds_evaluate": 0,
        "seconds_samples": 0,
        "seconds_redone": 0,
        "seconds_train": 52,
    }
    assert str(spent) == (
        "0:01:38 in all, 53.1% of it training; starting 0:00:10, compiling 0:00:20, waiting for"
        " data 0:00:08, saving 0:00:03, validating 0:00:05"
    )
    again = Goodput(clock["now"], numbers)
    clock["now"] += 2
    again.started()
    assert again.numbers()["seconds_start"] == 12
    assert again.numbers()["goodput"] == 52 / 100


def test_steps_that_were_not_saved_are_done_again(clock):
    """Step 6 is gone on with, and 8 had been done."""
    spent = Goodput(100.0, {}, redo=8)
    for step in (7, 8):
        spent.step(step)
        clock["now"] += 10
    assert spent.numbers()["seconds_redone"] == 20
    assert spent.numbers()["goodput"] == 0
    for step in (9, 10):
        spent.step(step)
        clock["now"] += 10
    assert spent.numbers()["seconds_redone"] == 20
    assert spent.numbers()["goodput"] == 0.5


def test_the_metrics_know_what_was_before(tmp_path):
    lines = [{"step": 1}, {"step": 2}, {"step": 2, "goodput": 0.5, "seconds_train": 7.0}]
    lines += [{"step": 3}, {"step": 4}, {"step": 4, "goodput": 0.6}, {"step": 5}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with Metrics(tmp_path, LogSettings(tensorboard=False), 3) as metrics:
        assert metrics.before["seconds_train"] == 7.0
        assert metrics.reached == 5
    with Metrics(tmp_path, LogSettings(tensorboard=False), 3) as metrics:
        assert metrics.reached == 3
