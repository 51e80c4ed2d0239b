"""The evaluation while training: numbers in the metrics, and the best checkpoints by them."""

import dataclasses
from concurrent.futures import Future

import numpy as np
import pytest
from tiny_run import lines_of, make_clips, make_model, settings_for

from llasa_jax.convert.model_folder import saved_steps
from llasa_jax.demo.tiny import make_tiny_codec
from llasa_jax.errors import UserError
from llasa_jax.evaluate import training
from llasa_jax.evaluate.scorers import Scores
from llasa_jax.generate import speaker
from llasa_jax.train.loop import train

LIKENESS = [0.1, 0.9, 0.3, 0.2]  # of the voice, at steps 1 to 4


class Scripted:
    """`Scoring` that finds what it is to find, and fails at the third evaluation if so asked."""

    def __init__(self, names, device, language):
        assert (list(names), device, language) == (["wavlm"], "cpu", "en")
        self.higher_is_better, self.asked = {"similarity": True}, []

    def submit(self, waves, texts, references):
        self.asked.append((texts, references))
        future = Future()
        likeness = LIKENESS[len(self.asked) - 1]
        if likeness is None:
            future.set_exception(RuntimeError("out of memory"))
        else:
            # The second clip has no speech, and no likeness.
            future.set_result(Scores({"similarity": np.array([likeness, np.nan])}, ["", ""]))
        return future

    def __exit__(self, *error):
        pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    make_model(folder / "model")
    make_tiny_codec(folder / "codec")
    return folder


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    """Scripted scorers, and no long speech of a model that does not know when to stop."""
    monkeypatch.setattr(training, "Scoring", Scripted)
    monkeypatch.setattr(speaker, "plausible_limit", lambda text: 10)


def settings_of(tiny, out, **evaluate):
    evaluate = {
        "every": 1,
        "texts": ["word", "dog"],
        "scorers": ["wavlm"],
        "language": "en",
        "speaker": "ada",
    } | evaluate
    return settings_for(
        tiny / "model",
        out,
        train={
            "steps": 4,
            "save_every": 1,
            "keep": 1,
            "keep_best": 1,
            "keep_best_by": "evaluate_similarity",
        },
        log={"codec": str(tiny / "codec")},
        evaluate=evaluate,
    )


def test_the_best_by_an_evaluation_is_kept(tiny, tmp_path, capsys):
    run = train(settings_of(tiny, tmp_path / "run"), [make_clips()])
    found = {line["step"]: line for line in lines_of(run) if "evaluate_similarity" in line}
    assert [found[step]["evaluate_similarity"] for step in (1, 2, 3, 4)] == LIKENESS
    assert all(0 <= line["evaluate_stopped"] <= 1 for line in found.values())
    assert saved_steps(run) == [2, 4]
    said = capsys.readouterr().out
    assert "step 2  evaluate_similarity 0.9" in said
    assert "the best checkpoint is that of step 2, with evaluate_similarity of 0.9000" in said
    # A run that goes on knows how good the checkpoints are that it finds.
    longer = settings_of(tiny, tmp_path / "run")
    train(longer, [make_clips()])
    assert "that of step 2" in capsys.readouterr().out


def test_scorers_that_fail_do_not_end_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "LIKENESS", [None, 0.5, 0.6, 0.7])
    with pytest.warns(UserWarning, match="an evaluation is left out: out of memory"):
        run = train(settings_of(tiny, tmp_path / "run", every=2), [make_clips()])
    assert saved_steps(run)[-1] == 4


@pytest.mark.parametrize(
    ("group", "values", "said"),
    [
        ("evaluate", {"texts": []}, "there are no evaluate.texts or no evaluate.scorers"),
        ("log", {"codec": ""}, "evaluate.every needs log.codec"),
        (
            "evaluate",
            {"every": 0},
            "keep_best_by is evaluate_similarity, which no evaluation finds",
        ),
        (
            "train",
            {"keep_best_by": "evaluate_mos"},
            "which evaluate.scorers do not measure; choose"
            " validation_loss or one of evaluate_similarity, evaluate_stopped",
        ),
    ],
)
def test_settings_that_cannot_work(tiny, tmp_path, group, values, said):
    settings = settings_of(tiny, tmp_path / "run")
    changed = dataclasses.replace(getattr(settings, group), **values)
    with pytest.raises(UserError, match=said):
        train(dataclasses.replace(settings, **{group: changed}), [make_clips()])
