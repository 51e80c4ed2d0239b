"""Datasets in Parquet files: the records that `datasets` gives, without its copy of the audio."""

import io
import json
import pickle
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import soundfile
from counting_codec import CountingCodec
from places import FIXTURES, ROOT, environment

from llasa_jax.data.builder import open_dataset
from llasa_jax.encode import parquet_table
from llasa_jax.encode.hf_dataset import import_hf_dataset
from llasa_jax.encode.parquet_table import open_parquet
from llasa_jax.errors import UserError
from llasa_jax.runtime import storage

COLUMNS = {"audio": "audio", "text": "sentence", "speaker": "who"}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Seventy rows, one without audio and one without text, and a folder for `datasets`' cache."""
    datasets = pytest.importorskip("datasets", reason="the package `datasets` is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rng = np.random.default_rng(0)

    def sound():
        file = io.BytesIO()
        wave = 0.1 * rng.standard_normal(rng.integers(800, 4000))
        soundfile.write(file, wave, 16000, format="wav", subtype="PCM_16")
        return {"bytes": file.getvalue(), "path": "x.wav"}

    rows = {
        "audio": [sound() for _ in range(69)] + [None],
        "sentence": ["", *(f"Row {i}." for i in range(1, 70))],
        "who": [i % 3 for i in range(70)],
    }
    found = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio())
    return found.cast_column("who", datasets.ClassLabel(names=["ada", "bob", "cyd"]))


@pytest.fixture
def files(table, tmp_path):
    """In two files of train and one of dev, in row groups of 20 and 7 rows."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, part, rows in (
        ("train-00000-of-00002", range(40), 20),
        ("train-00001-of-00002", range(40, 60), 7),
        ("dev", range(60, 70), 20),
    ):
        table.select(part).to_parquet(folder / f"{name}.parquet", batch_size=rows)
    return folder


def record_files(out):
    return {path.name: path.read_bytes() for path in out.glob("*.array_record-*")}


@pytest.mark.slow
def test_the_records_of_datasets_without_a_copy(table, files, tmp_path):
    import datasets

    saved = {"train": table.select(range(60)), "dev": table.select(range(60, 70))}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    wanted = import_hf_dataset(
        tmp_path / "saved", tmp_path / "wanted", COLUMNS, CountingCodec(), workers=1
    )
    # Interrupted, and gone on with.
    with pytest.raises(KeyboardInterrupt):
        import_hf_dataset(files, tmp_path / "out", COLUMNS, CountingCodec(limit=9), workers=1)
    codec = CountingCodec()
    made = import_hf_dataset(files, tmp_path / "out", COLUMNS, codec, workers=1)
    assert (made.splits, made.bad, made.resumed) == (wanted.splits, 2, 9)
    assert made.encoded == len(codec.seen) == 68 - 9
    assert record_files(tmp_path / "out") == record_files(tmp_path / "wanted")
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    records = open_dataset(tmp_path / "out", "validation")
    assert {records[i]["speaker"] for i in range(len(records))} == {"ada", "bob", "cyd"}


def test_rows_in_order_are_one_pass(table, files, monkeypatch):
    begun = []
    begin = parquet_table._Forward._begin
    monkeypatch.setattr(
        parquet_table._Forward, "_begin", lambda self, at: (begun.append(at), begin(self, at))[1]
    )
    train = open_parquet(files, None)["train"]
    rows = table.cast_column("audio", type(table.features["audio"])(decode=False))
    for index in range(60):
        assert train.audio(index, {"audio": "audio"}) == rows[index]["audio"]["bytes"]
    assert begun == [0, 20, 40, 47, 54]
    # Rows that others read in between are passed over; a step back begins the group again.
    again = pickle.loads(pickle.dumps(train))
    for index in (3, 17, 41, 46, 4):
        assert again.audio(index, {"audio": "audio"}) == rows[index]["audio"]["bytes"]
    assert begun[5:] == [3, 41, 4]
    assert again.texts(5, {"text": "sentence", "speaker": "who"}) == {
        "text": "Row 5.",
        "speaker": "cyd",
    }


@pytest.fixture
def wanted(files, tmp_path):
    """The records of the same files on the disk."""
    import_hf_dataset(files, tmp_path / "wanted", COLUMNS, CountingCodec(), workers=1)
    return record_files(tmp_path / "wanted")


@pytest.mark.slow
def test_a_dataset_on_the_hub_is_read_and_not_kept(files, wanted, tmp_path):
    """In a process of its own: libraries read the hub's address as they are imported."""
    address, home = tmp_path / "address", tmp_path / "home"
    server = [sys.executable, FIXTURES / "hub_server.py", files, "org/voices", address]
    program = (
        "import sys; from pathlib import Path; from counting_codec import CountingCodec;"
        " from llasa_jax.encode.hf_dataset import import_hf_dataset;"
        f" import_hf_dataset('org/voices', Path(sys.argv[1]), {COLUMNS}, CountingCodec())"
    )
    with subprocess.Popen(server) as hub:
        try:
            while not address.exists():
                assert hub.poll() is None
                time.sleep(0.05)
            own = environment(
                1, HF_ENDPOINT=address.read_text(), HF_HOME=str(home), HF_HUB_OFFLINE="0"
            )
            own["PYTHONPATH"] = f"{FIXTURES}:{ROOT}"
            out = tmp_path / "out"
            subprocess.run([sys.executable, "-c", program, out], env=own, check=True)
            with urllib.request.urlopen(f"{address.read_text()}/_served") as answer:
                served = json.loads(answer.read())
        finally:
            hub.kill()
    assert record_files(out) == wanted
    assert set(served) == {file.name for file in files.iterdir()}
    kept = [path for path in home.rglob("*") if path.is_file() and path.stat().st_size]
    assert not kept


def test_parquet_in_a_bucket(files, wanted, tmp_path, bucket):
    for file in files.iterdir():
        storage.write_bytes(f"{bucket}/voices/{file.name}", file.read_bytes())
    made = import_hf_dataset(f"{bucket}/voices", tmp_path / "out", COLUMNS, CountingCodec())
    assert (made.encoded, made.bad) == (68, 2)
    assert record_files(tmp_path / "out") == wanted
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    with pytest.raises(UserError, match=f"{bucket}/none"):
        import_hf_dataset(f"{bucket}/none", tmp_path / "no", COLUMNS, CountingCodec())
    storage.write_bytes(f"{bucket}/texts/a.txt", b"nothing")
    with pytest.raises(UserError, match=f"{bucket}/texts: no Parquet files are there"):
        import_hf_dataset(f"{bucket}/texts", tmp_path / "no", COLUMNS, CountingCodec())


def test_refusals(table, files, tmp_path):
    table.rename_column("who", "voice").to_parquet(files / "train-00001-of-00002.parquet")
    with pytest.raises(UserError, match="has other columns than .*train-00000"):
        import_hf_dataset(files, tmp_path / "out", COLUMNS, CountingCodec())
    (files / "train-00001-of-00002.parquet").write_bytes(b"PAR1, or so")
    with pytest.raises(UserError, match="00001-of-00002.parquet: cannot be read .*copy it again"):
        import_hf_dataset(files, tmp_path / "out", COLUMNS, CountingCodec())
