"""Two processes as two hosts: one goes on where they stopped, with their losses, bit for bit."""

import shutil

import pytest
from host_processes import train_together
from tiny_run import lines_of, make_clips, make_model

from llasa_jax.convert.model_folder import saved_steps
from llasa_jax.data.builder import write_dataset
from llasa_jax.demo.tiny import make_tiny_codec

pytestmark = pytest.mark.soak
SETTINGS = (
    *("--train.rows=4", "--train.accumulation=2", "--train.steps=4", "--train.save_every=2"),
    *("--train.keep=9", "--train.validate_every=2", "--optimizer.learning_rate=0.01"),
    *("--data.validation_split=validation", "--data.streams=2"),
    *("--log.samples=[a]", "--log.samples_every=4"),
)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The settings that name model and data."""
    folder = tmp_path_factory.mktemp("many")
    make_model(folder / "model")
    rows = [
        {"id": clip.id, "text": clip.text, "codes": clip.codes}
        | {"speaker": clip.speaker, "description": "", "language": ""}
        for clip in make_clips(60)
    ]
    splits = {"train": iter(rows[:50]), "validation": iter(rows[50:])}
    write_dataset(folder / "records", splits, {"codec": "tiny", "fingerprint": "unknown"})
    make_tiny_codec(folder / "codec")
    return [
        f"--model.path={folder / 'model'}",
        f"--data.path={folder / 'records'}",
        f"--log.codec={folder / 'codec'}",
        *SETTINGS,
    ]


def numbers(run):
    """What a run says of each step, without what depends on the clock."""
    names = "loss", "grad_norm", "accuracy", "targets", "fill", "validation_loss"
    found = {}
    for line in lines_of(run):
        found.setdefault(line["step"], {}).update({n: line[n] for n in names if n in line})
    return found


def mesh(axis):
    return [f"--mesh.{name}={2 if name == axis else 1}" for name in ("data", "fsdp", "tensor")]


def test_two_hosts_train_as_one(given, tmp_path):
    """One host goes on from the first checkpoint of the two, and does what they did."""
    out = tmp_path / "two"
    train_together(tmp_path / "logs2", 2, 1, *given, *mesh("fsdp"), f"--out={out}")
    wanted = numbers(out)
    assert list(wanted) == [1, 2, 3, 4]
    assert {"loss", "validation_loss"} <= wanted[4].keys()
    one = shutil.copytree(out, tmp_path / "one")
    shutil.rmtree(one / "checkpoints" / "4")
    shutil.rmtree(one / "samples")
    train_together(tmp_path / "logs1", 1, 2, *given, *mesh("fsdp"), f"--out={one}")
    assert "going on after step 2" in (tmp_path / "logs1" / "0.out").read_text()
    assert numbers(one) == wanted
    alone, together = ((run / "samples").iterdir() for run in (one, out))
    spoken = {wave.name: wave.read_bytes() for wave in together}
    assert spoken == {wave.name: wave.read_bytes() for wave in alone}
    assert spoken

    # The parts of each layer over the hosts, which then have the same rows; and a checkpoint after
    # every step, as no step takes less than 6 us.
    parts = tmp_path / "parts"
    often = "--train.save_minutes=1e-7"
    train_together(tmp_path / "logs", 2, 1, *given, *mesh("tensor"), f"--out={parts}", often)
    assert saved_steps(parts) == [1, 2, 3, 4]
    for step, found in numbers(parts).items():
        assert found == pytest.approx(wanted[step], rel=1e-4)


def test_two_hosts_speak_and_rate_as_one(given, tmp_path):
    """GRPO, whose speeches two hosts draw together and score by halves."""
    (tmp_path / "texts.txt").write_text("the dog\na fox\nthe kettle is on\na door\n")
    rewards = '[{"score": "longest_pause", "shape": "exp"}, {"score": "tail_noise"}]'
    settings = [
        *(one for one in given if one.startswith(("--model.path", "--log.codec"))),
        *(f"--data.path={tmp_path / 'texts.txt'}", "--data.max_length=128", "--align.loss=grpo"),
        *("--train.rows=8", "--train.steps=3", "--train.save_every=1", "--train.keep=9"),
        *("--align.grpo.scorers=[levels]", f"--align.grpo.rewards={rewards}"),
        *("--align.grpo.texts=2", "--align.grpo.samples=4", "--align.grpo.updates=2"),
        *("--align.grpo.combine=mean", "--align.grpo.unstopped=0", "--align.grpo.max_seconds=0.4"),
        *("--align.grpo.pace=0.5", "--align.grpo.free_pace=1"),
        *("--align.grpo.patience=0", "--align.grpo.kl=0.1", "--optimizer.learning_rate=0.01"),
        *mesh("fsdp"),
    ]
    runs = tmp_path / "two", tmp_path / "one"
    for hosts, run in zip((2, 1), runs, strict=True):
        train_together(tmp_path / f"logs{hosts}", hosts, 2 // hosts, *settings, f"--out={run}")
    names = "loss", "grad_norm", "reward", "reward_deviation", "kl"
    two, one = ([{n: line.get(n) for n in names} for line in lines_of(run)] for run in runs)
    assert two == one
    assert sum(line["reward"] is not None for line in two) == 2
    for name in ("000000.jsonl", "000001.jsonl"):
        logs = [(run / "rollouts" / name).read_bytes() for run in runs]
        assert logs[0] == logs[1]
    # One goes on from a checkpoint of the two.
    shutil.rmtree(runs[0] / "checkpoints" / "3")
    shutil.rmtree(runs[0] / "checkpoints" / "2")
    train_together(tmp_path / "again", 1, 2, *settings, f"--out={runs[0]}")
    again = [{n: line.get(n) for n in names} for line in lines_of(runs[0])]
    assert again == one
