"""Two processes as two hosts: the losses of one, bit for bit, and one goes on where two stopped."""

import shutil

import pytest
from host_processes import train_together
from tiny_run import lines_of, make_clips, make_model

from llasa_jax.data.builder import write_dataset

pytestmark = pytest.mark.slow
SETTINGS = (
    *("--train.rows=4", "--train.accumulation=2", "--train.steps=6", "--train.save_every=2"),
    *("--train.keep=9", "--train.validate_every=3", "--optimizer.learning_rate=0.01"),
    *("--data.validation_split=validation", "--data.streams=2"),
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
    return [f"--model.path={folder / 'model'}", f"--data.path={folder / 'records'}", *SETTINGS]


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
    """Then one host goes on from the first checkpoint of the two."""
    for hosts in (1, 2):
        out = f"--out={tmp_path / f'run{hosts}'}"
        train_together(tmp_path / f"logs{hosts}", hosts, 2 // hosts, *given, *mesh("fsdp"), out)
    wanted = numbers(tmp_path / "run1")
    assert list(wanted) == [*range(1, 7)]
    assert {"loss", "validation_loss"} <= wanted[3].keys()
    assert numbers(tmp_path / "run2") == wanted
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run2" / "checkpoints" / str(step))
    train_together(tmp_path / "again", 1, 2, *given, *mesh("fsdp"), f"--out={tmp_path / 'run2'}")
    assert "going on after step 2" in (tmp_path / "again" / "0.out").read_text()
    assert numbers(tmp_path / "run2") == wanted

    # The parts of each layer over the hosts, which then have the same rows
    out = f"--out={tmp_path / 'parts'}"
    train_together(tmp_path / "logs3", 2, 1, *given, *mesh("tensor"), out)
    for step, found in numbers(tmp_path / "parts").items():
        assert found == pytest.approx(wanted[step], rel=1e-4)
