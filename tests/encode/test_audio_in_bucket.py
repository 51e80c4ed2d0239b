"""Audio, manifests and datasets in buckets, with the codes and records that folders give."""

import json
import shutil

import numpy as np
import pytest
from counting_codec import CountingCodec
from places import SPEECH

from llasa_jax.data.builder import dataset_fingerprint, open_dataset, read_metadata, split_sizes
from llasa_jax.data.manifest import file_key, read_manifest
from llasa_jax.encode.offline import encode
from llasa_jax.encode.online_cache import CodesCache, check_place
from llasa_jax.encode.sources import ManifestAudio
from llasa_jax.errors import UserError
from llasa_jax.inspect.report import report
from llasa_jax.runtime import storage
from llasa_jax.runtime.bucket_files import upload
from llasa_jax.runtime.storage import as_path


@pytest.fixture
def audio(tmp_path):
    """A manifest of four clips, beside them."""
    lines = (SPEECH / "manifest.jsonl").read_text().splitlines()[::10]
    folder = tmp_path / "in"
    folder.mkdir()
    for line in lines:
        shutil.copy(SPEECH / json.loads(line)["audio"], folder)
    (folder / "m.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def records(folder, split="train"):
    opened = open_dataset(folder, split)
    found = [opened[index] for index in range(len(opened))]
    return {each["id"]: (each["text"], each["codes"].tolist()) for each in found}


def test_from_audio_in_a_bucket_to_a_dataset_in_a_bucket(bucket, audio, tmp_path, capsys):
    upload(audio, f"{bucket}/audio")
    local = encode(audio / "m.jsonl", tmp_path / "codes", CountingCodec(), workers=1)
    out = f"{bucket}/codes"
    made = encode(f"{bucket}/audio/m.jsonl", out, CountingCodec(), workers=1)
    assert made.splits == local.splits
    assert records(out) == records(tmp_path / "codes")
    assert dataset_fingerprint(out) == dataset_fingerprint(tmp_path / "codes")
    assert read_metadata(out) == read_metadata(tmp_path / "codes")
    assert sum(split_sizes(out).values()) == len(audio.joinpath("m.jsonl").read_text().splitlines())
    assert set(storage.entries(out)) >= {"seal.json", "dataset_info.json", "features.json"}
    # Given again, it does nothing.
    again = CountingCodec()
    encode(f"{bucket}/audio/m.jsonl", out, again, workers=1)
    assert not again.seen
    assert "done already by the same command" in capsys.readouterr().out
    report(out, f"{bucket}/report.html")
    assert b"<html" in storage.read_bytes(f"{bucket}/report.html")
    # Half a dataset.
    shard = next(name for name in storage.entries(out) if ".array_record-" in name)
    storage.remove(f"{out}/{shard}")
    with pytest.raises(UserError, match=f"the split 'train' lacks {shard}; copy the whole folder"):
        open_dataset(out, "train")
    storage.remove(f"{out}/dataset_info.json")
    with pytest.raises(UserError, match=r"no dataset of codes, it has no dataset_info.json"):
        open_dataset(out, "train")


def test_clips_that_are_not_in_the_bucket_are_listed(bucket, audio):
    upload(audio, f"{bucket}/audio")
    first, second = read_manifest(f"{bucket}/audio/m.jsonl")[:2]
    assert file_key(first.audio)[1] == (audio / first.audio.name).stat().st_size
    storage.remove(second.audio)
    encode(
        f"{bucket}/audio/m.jsonl", f"{bucket}/codes", CountingCodec(), workers=1, max_bad_share=0.5
    )
    lines = as_path(f"{bucket}/codes.bad.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [second.id]
    assert "no such audio file" in lines[0]


def test_places_that_cannot_be_written_or_read(bucket, audio):
    with pytest.raises(UserError, match="gs://read-only: access denied"):
        encode(audio / "m.jsonl", "gs://read-only/codes", CountingCodec(), workers=1)
    with pytest.raises(UserError, match="no such manifest"):
        encode(f"{bucket}/none.jsonl", f"{bucket}/codes", CountingCodec(), workers=1)


def test_another_machine_goes_on_with_what_one_has_encoded(bucket, audio, tmp_path, monkeypatch):
    out = f"{bucket}/codes"
    with pytest.raises(KeyboardInterrupt):
        encode(audio / "m.jsonl", out, CountingCodec(limit=2), workers=1)
    assert "codes.partial/journal.sqlite" in storage.entries(bucket)
    monkeypatch.setenv("LLASA_JAX_CACHE", str(tmp_path / "another"))
    codec = CountingCodec()
    made = encode(audio / "m.jsonl", out, codec, workers=1)
    assert made.resumed == 2
    assert len(codec.seen) == sum(made.splits.values()) - 2
    assert not [name for name in storage.entries(bucket) if "partial" in name]


def test_the_cache_of_online_training_in_a_bucket(bucket, audio, tmp_path, monkeypatch, capsys):
    codec, source = CountingCodec(), ManifestAudio(audio / "m.jsonl")
    splits = {"train": [*source.split("train")]}
    codes = {index: np.arange(9, dtype=np.uint16) + index for index in splits["train"]}

    def open_cache():
        return CodesCache(f"{bucket}/cache", source, splits, codec)

    cache = open_cache()
    with pytest.raises(UserError, match="another process"):
        open_cache()
    cache.put([*codes.items()])
    cache.finish(set())
    cache.close()
    assert f"data.path={bucket}/cache trains" in capsys.readouterr().out
    made = records(f"{bucket}/cache")
    assert {name: made[name][1] for name in made} == {
        source.ids[index]: each.tolist() for index, each in codes.items()
    }
    monkeypatch.setenv("LLASA_JAX_CACHE", str(tmp_path / "another"))
    again = open_cache()
    np.testing.assert_array_equal(again.get(splits["train"][0]), codes[splits["train"][0]])
    again.finish(set())
    again.close()
    assert records(f"{bucket}/cache") == made
    storage.write_bytes(f"{bucket}/cache/notes.txt", b"mine")
    with pytest.raises(UserError, match=r"holds notes.txt, which no cache of codes holds"):
        open_cache()
    for out in (f"{bucket}/cache", bucket):
        with pytest.raises(UserError, match="must not lie in each other"):
            check_place(f"{bucket}/cache", out)
    check_place(f"{bucket}/cache", f"{bucket}/run")
