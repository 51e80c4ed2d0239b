"""`llasa-jax prefer` with a model of random weights, and training on the pairs that it makes."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from tiny_run import lines_of, make_clips, make_model, settings_for

from llasa_jax.align import prefer as module
from llasa_jax.align.journal import ROWS, SampleJournal, packed, unpacked
from llasa_jax.align.prefer import rank, records_of
from llasa_jax.align.settings import AlignSettings, DpoSettings
from llasa_jax.cli import main
from llasa_jax.convert.model_folder import load_params
from llasa_jax.data.builder import dataset_fingerprint, read_metadata, write_dataset
from llasa_jax.data.records import open_utterances, record_of
from llasa_jax.demo.tiny import make_tiny_codec
from llasa_jax.errors import UserError
from llasa_jax.evaluate.texts import Item
from llasa_jax.generate import speaker
from llasa_jax.model.sharding import make_mesh
from llasa_jax.speech.prompts import Pair, Utterance
from llasa_jax.train.loop import train
from llasa_jax.train.reference import FILE
from llasa_jax.train.step import TrainStep

TEXTS = ["the dog", "a fox", "the kettle is on", "a door"]


class LowVoices:
    """Scorers in this process: `low` is the mean level, the lower the better."""

    higher_is_better = {"low": False}

    def __init__(self, names, device="cpu", language="", processes=1):
        self.given, self.processes = (names, device, language, processes), processes
        LowVoices.last = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, waves, texts, references):
        numbers = {"low": np.array([np.abs(wave).mean() for wave in waves])}
        scores = module.Scores(numbers, list(texts))
        future = module.Future()
        future.set_result(scores)
        return future


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefer")
    make_model(folder / "model")
    make_tiny_codec(folder / "codec")
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speaker, "plausible_limit", lambda text: 8)
        patch.setattr(module, "Scoring", LowVoices)
        assert main(command(folder, folder / "pairs", "--scorer-processes", "2")) == 0
    assert LowVoices.last.given[1:] == ("cpu", "", 2)
    return folder


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    monkeypatch.setattr(speaker, "plausible_limit", lambda text: 8)
    monkeypatch.setattr(module, "Scoring", LowVoices)


def command(folder, out, *options):
    return [
        *("prefer", str(folder / "model"), "--texts", str(folder / "texts.txt")),
        *("--out", str(out), "--codec", str(folder / "codec"), "--dtype", "float32"),
        *("--samples", "4", "--pairs", "2", *options),
    ]


def samples_of(out):
    lines = (out.with_name(f"{out.name}.samples") / ROWS).read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def test_the_best_and_the_worst_samples_are_pairs(folder):
    pairs, rows = open_utterances(folder / "pairs", "train").pairs(), samples_of(folder / "pairs")
    assert len(pairs) == 2 * len(TEXTS) == 2 * len(rows)
    for pair in pairs:
        row = rows[pair.id.removesuffix("#1")]
        assert len({sample["codes"] for sample in row["samples"]}) == 4
        order = sorted(row["samples"], key=lambda sample: sample["scores"]["low"])
        at = int(pair.id.endswith("#1"))
        for spoken, sample in ((pair.better, order[at]), (pair.worse, order[-1 - at])):
            np.testing.assert_array_equal(spoken.codes, unpacked(sample["codes"]))
            assert spoken.text in TEXTS
    assert read_metadata(folder / "pairs")["hop"] == 320
    # Read as clips, they are the better ones.
    assert open_utterances(folder / "pairs", "train")[0].codes.tolist() == (
        pairs[0].better.codes.tolist()
    )


@pytest.mark.soak
def test_a_killed_command_goes_on(folder, tmp_path, monkeypatch, capsys):
    real, out = SampleJournal.add, tmp_path / "pairs"

    def add(journal, row):
        if len(journal.rows) == 2:
            raise KeyboardInterrupt
        real(journal, row)

    monkeypatch.setattr(SampleJournal, "add", add)
    assert main(command(folder, out)) == 130
    with (tmp_path / "pairs.samples" / ROWS).open("a") as file:
        file.write('{"id": "half a li')
    monkeypatch.setattr(SampleJournal, "add", real)
    assert main(command(folder, out)) == 0
    assert "2 of 4 texts are done already" in capsys.readouterr().out
    assert dataset_fingerprint(out) == dataset_fingerprint(folder / "pairs")
    assert samples_of(out) == samples_of(folder / "pairs")
    # Another choice of pairs needs no new samples; the same command finds its work done.
    monkeypatch.setattr(module.Speaker, "load", None)
    assert main(command(folder, out)) == 0
    assert "8 pairs of 4 of 4 texts" in capsys.readouterr().out
    assert main(command(folder, out, "--pairs", "1")) == 2
    assert "made of other input or with other settings" in capsys.readouterr().err
    (tmp_path / "pairs.samples").rename(tmp_path / "one.samples")
    assert main(command(folder, tmp_path / "one", "--pairs", "1")) == 0
    assert main(command(folder, tmp_path / "one", "--pairs", "1", "--seed", "1")) == 2


def sample(codes, stopped=True, logprob=-1.0, **scores):
    codes = packed(np.array(codes, np.uint16))
    return {"codes": codes, "stopped": stopped, "logprob": logprob, "scores": scores} | {
        "transcript": ""
    }


def test_scores_decide_in_order():
    higher = {"wer": False, "similarity": True}
    samples = [
        sample([1], wer=0.5, similarity=0.9),
        sample([2], wer=0.0, similarity=0.1),
        sample([3], wer=None, similarity=1.0),
        sample([4], wer=0.0, similarity=0.2, stopped=False),
        sample([], wer=0.0, similarity=1.0),
        sample([5], wer=0.0, similarity=0.2),
    ]
    order = [unpacked(each["codes"])[0] for _, each in rank(samples, higher)]
    assert order == [5, 4, 2, 1, 3]


@pytest.mark.parametrize(
    ("scores", "gap", "count"), [((0.2, 0.2), 0, 0), ((0.2, 0.3), 0, 1), ((0.2, 0.3), 0.2, 0)]
)
def test_speeches_without_a_difference_are_no_pair(scores, gap, count):
    samples = [sample([at], wer=wer, logprob=-at) for at, wer in enumerate(scores)]
    row = {"prompt": packed(np.array([7, 8])), "higher_is_better": {"wer": False}}
    item = Item("a", "two", prompt_text="One.")
    made = records_of(item, row | {"samples": samples}, 1, gap)
    assert len(made) == count
    for record in made:
        assert record["text"] == "One. two"
        assert record["codes"].tolist() == [7, 8, 0]
        assert record["worse"].tolist() == [7, 8, 1]
        assert record["prompt"] == 2


def test_a_pair_has_loss_on_what_was_drawn(prompter):
    clip = Utterance("two", np.array([7, 8, 1, 2], np.uint16), "a")
    worse = dataclasses.replace(clip, codes=np.array([7, 8, 3], np.uint16))
    pair = Pair(clip, worse, prompt=2, stopped=(True, False), reference=(-3.0, -4.0))
    example = prompter.example(pair)
    first, second = np.split(example.tokens[example.loss], [3])
    end = prompter.vocab.speech_end
    assert first.tolist() == [*prompter.vocab.ids_of(clip.codes[2:]), end]
    assert second.tolist() == [*prompter.vocab.ids_of(worse.codes[2:])]
    assert example.lengths == tuple(len(prompter.example(each).tokens) for each in (clip, worse))
    # One number for each speech, at one of its tokens with loss.
    values = example.values["reference"]
    assert values[values != 0].tolist() == [-3.0, -4.0]
    assert example.loss[values != 0].all()


def dpo_settings(folder, out, **changes):
    settings = settings_for(
        folder / "model",
        out,
        train={"steps": 4, "save_every": 2, "validate_every": 2},
        optimizer={"learning_rate": 1e-3},
        mesh={"data": 1, "fsdp": 1, "tensor": 1},
        data={"max_length": 192, "path": str(folder / "pairs"), **changes},
    )
    return dataclasses.replace(settings, align=AlignSettings("dpo", DpoSettings(beta=0.5)))


@pytest.mark.soak
def test_it_trains_on_them_and_goes_on_bit_for_bit(folder, tmp_path, monkeypatch):
    def run(out):
        records = [open_utterances(folder / "pairs", "train").pairs()]
        return train(dpo_settings(folder, out), records, [make_clips(3)])

    monkeypatch.setattr("llasa_jax.train.prepare.make_mesh", one_device)
    whole = run(tmp_path / "whole")
    steps = [line for line in lines_of(whole) if "loss" in line]
    # Before any update the model is its own reference, but two programs compute the
    # log-probabilities, some -120 nats a speech, where float32 has steps of 7.6e-6. A margin is of
    # four of them, so with beta 0.5 a step each gives 1.5e-5, of which the loss, whose slope is
    # 1/2 there, has half.
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=7.6e-6)
    assert steps[0]["reward_margin"] == pytest.approx(0, abs=1.53e-5)
    assert steps[-1]["loss"] < 0.5
    assert steps[-1]["reward_better"] > steps[-1]["reward_worse"]
    assert [line["step"] for line in lines_of(whole) if "validation_loss" in line] == [2, 4]

    real_place, count = TrainStep.place, iter(range(100))

    def place(*args):
        if next(count) == 3 + 1:  # two for the reference, then the batch of step 3
            os.kill(os.getpid(), signal.SIGTERM)
        return real_place(*args)

    monkeypatch.setattr(TrainStep, "place", place)
    with pytest.raises(SystemExit):
        run(tmp_path / "stopped")
    monkeypatch.setattr(TrainStep, "place", real_place)
    kept = (tmp_path / "stopped" / FILE).read_bytes()
    assert len(json.loads(kept)[0]) == 2 * len(TEXTS)
    run(tmp_path / "stopped")
    assert [{**line, **UNTIMED} for line in lines_of(tmp_path / "stopped") if "loss" in line] == [
        {**line, **UNTIMED} for line in steps
    ]
    one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    ends = [load_params(tmp_path / run, one, np.float32, 4) for run in ("whole", "stopped")]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    (tmp_path / "stopped" / FILE).unlink()
    with pytest.raises(UserError, match="has lost its reference.json"):
        run(tmp_path / "stopped")


UNTIMED = dict.fromkeys(("tokens_per_second", "speech_hours_per_hour", "data_wait"))


def one_device(*shape, **more):
    return make_mesh(*shape, **more, devices=jax.devices()[:1])


def test_what_is_wrong_is_said_in_a_sentence(folder, tmp_path):
    write_dataset(tmp_path / "clips", {"train": [record_of(c, c.codes) for c in make_clips(2)]}, {})
    with pytest.raises(UserError, match="holds no pairs, which align.loss dpo trains on"):
        open_utterances(tmp_path / "clips", "train").pairs()
    for changes, said in (
        ({"too_long": "cut"}, "a pair that is cut has lost what ranks it"),
        ({"mode": "online"}, "is no dataset of pairs of speech"),
    ):
        with pytest.raises(UserError, match=said):
            dpo_settings(folder, tmp_path / "run", **changes)
    with pytest.raises(UserError, match="align.dpo is set, but align.loss is supervised"):
        dataclasses.replace(
            settings_for(folder / "model", tmp_path), align=AlignSettings(dpo=DpoSettings(beta=1))
        )
