"""Online is offline, to the bit: the same rows of the same codes, whatever is slow, bad, dead,
killed or resumed.
"""

import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from counting_codec import CountingCodec
from places import SPEECH
from slow_audio import SlowAudio
from tiny_run import lines_of, losses, make_model, settings_for

from llasa_jax.codec import load_codec
from llasa_jax.data import builder
from llasa_jax.data.batching import BatchShape, Source, ToExample, batches
from llasa_jax.data.builder import open_dataset
from llasa_jax.data.records import open_utterances
from llasa_jax.data.settings import SourceSettings
from llasa_jax.demo.tiny import make_tiny_codec
from llasa_jax.encode.devices import share_gpu
from llasa_jax.encode.encoder import Encoder
from llasa_jax.encode.mixture import codec_of, open_sources
from llasa_jax.encode.offline import encode
from llasa_jax.encode.online import OnlineBatches
from llasa_jax.encode.online_cache import CodesCache, check_place, open_encoder
from llasa_jax.encode.planned import PlannedClips, Skipped
from llasa_jax.encode.readers import CHANCES, STARTS, Readers
from llasa_jax.encode.settings import OnlineSettings
from llasa_jax.encode.sources import ManifestAudio
from llasa_jax.errors import UserError
from llasa_jax.inspect.doctor import doctor
from llasa_jax.inspect.preview import preview
from llasa_jax.runtime import hosts
from llasa_jax.speech.prompts import Prompter, PromptSettings
from llasa_jax.train.loop import train
from llasa_jax.train.step import TrainStep

SHAPE = BatchShape(accumulation=1, rows=2, length=512)
OPTIONS = {"seed": 3, "too_long": "drop"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def codec_folder(tmp_path_factory):
    return make_tiny_codec(tmp_path_factory.mktemp("codecs") / "tiny")


@pytest.fixture
def manifest(tmp_path):
    """Sixteen clips, free to be spoilt."""
    lines = (SPEECH / "manifest.jsonl").read_text().splitlines()[:16]
    (tmp_path / "in").mkdir()
    for line in lines:
        shutil.copy(SPEECH / json.loads(line)["audio"], tmp_path / "in")
    (tmp_path / "in/m.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "in/m.jsonl"


def encoder_of(audio, codec=None, caches=(None,), **changes):
    clips = PlannedClips(audio, "train", 0, Skipped())
    settings = OnlineSettings(
        **{"workers": 2, "torch_threads": 1, "queue": 2, "max_bad_share": 0.2} | changes
    )
    return Encoder(codec or CountingCodec(), [clips], settings, caches), clips


def online(encoder, clips, prompter, count, state=None, **options):
    """`count` batches, and the state after each."""
    made = OnlineBatches(encoder, [Source(clips, prompter)], SHAPE, **OPTIONS | options)
    if state:
        made.set_state(state)
    return [(next(made), made.get_state()) for _ in range(count)]


def same(ones, others):
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture
def offline(tmp_path, manifest, prompter):
    """Batches of the records that `encode` makes of the manifest."""

    def make(count, **options):
        if not (tmp_path / "codes").exists():
            encode(manifest, tmp_path / "codes", CountingCodec(), max_bad_share=0.2)
        source = Source(open_utterances(tmp_path / "codes", "train"), prompter)
        iterator = iter(batches([source], SHAPE, **OPTIONS | options))
        return [(next(iterator), iterator.get_state()) for _ in range(count)]

    return make


def test_the_same_batches_as_offline_in_the_same_places(manifest, prompter, offline):
    """Late clips come last, so the codec's batches finish in another order than the data's."""
    wanted = offline(9)
    encoder, clips = encoder_of(SlowAudio(manifest, late={0: 0.5, 5: 0.3}))
    with encoder:
        found = online(encoder, clips, prompter, 9)
    same([batch for batch, _ in found], [batch for batch, _ in wanted])
    assert [state for _, state in found] == [state for _, state in wanted]
    with encoder_of(ManifestAudio(manifest))[0] as encoder:
        again = online(encoder, clips, prompter, 4, state=found[4][1])
    same([batch for batch, _ in again], [batch for batch, _ in wanted[5:]])


def test_clips_that_are_not_encoded_are_refused_without_an_encoder(manifest, prompter):
    _, clips = encoder_of(ManifestAudio(manifest))
    assert clips[0].codes is None
    assert clips[0].num_codes == len(clips.audio.wave(clips.indices[0])) // 320 + 1
    with pytest.raises(UserError, match="is not encoded yet"):
        prompter.example(clips[0])
    with pytest.raises(UserError, match="is not encoded yet, and cannot be trained on"):
        next(iter(batches([Source(clips, prompter)], SHAPE, **OPTIONS)))


@pytest.mark.parametrize("cut", [None, 200, 3])
@pytest.mark.parametrize("settings", [{}, {"mask": "upstream"}, {"task": "asr"}])
def test_a_planned_example_with_its_codes_is_the_example(tokenizer, manifest, settings, cut):
    prompter = Prompter(tokenizer, PromptSettings(**settings))
    _, clips = encoder_of(ManifestAudio(manifest))
    codes = np.arange(clips[0].num_codes, dtype=np.uint16)
    utterance = replace(clips[0], codes=codes)
    to_example = ToExample([Source(clips, prompter)], cut or 10_000, "cut")
    planned, wanted = to_example(0, clips[0]), to_example(0, utterance)
    assert prompter.length(clips[0]) == prompter.length(utterance)
    found = prompter.with_codes(planned, codes)
    for name in ("tokens", "loss", "visible"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    assert not found.lacks_codes


def test_hosts_encode_only_their_own(manifest, prompter, offline):
    seen = []
    for host in range(2):
        codec = CountingCodec()
        encoder, clips = encoder_of(ManifestAudio(manifest), codec)
        with encoder:
            found = online(encoder, clips, prompter, 2, streams=2, here=[host], window=8)
        same([b for b, _ in found], [b for b, _ in offline(2, streams=2, here=[host], window=8)])
        seen.append(set(codec.seen))
    assert all(len(waves) < 16 for waves in seen)


def test_bad_clips_leave_holes_and_are_told(manifest, prompter, offline, tmp_path):
    good = ManifestAudio(manifest)
    # Half of it is not there, though its header says so; another has no header, and never was in a
    # row.
    for index, size in ((2, 0.5), (9, 0)):
        path = Path(good.key(index)[0])
        path.write_bytes(path.read_bytes()[: int(size * path.stat().st_size)])
    encoder, clips = encoder_of(good)
    encoder.skipped.list_in(tmp_path / "bad.jsonl")
    with encoder, pytest.warns(UserWarning, match="skipped") as told:
        found = online(encoder, clips, prompter, 12)
    assert len(told) == 2
    assert len(encoder.skipped) == 2
    listed = {
        row["id"]: row["reason"]
        for row in map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    }
    ids = [good.utterance(i).id for i in (2, 9)]
    assert listed.keys() == set(ids)
    assert "0 bytes" in listed[ids[1]]
    # Every good clip as often as any other, each whole in a segment of its own; the bad one has
    # left nothing.
    spoken = Counter()
    for batch, _ in found:
        for row in range(SHAPE.rows):
            for segment in range(1, batch["segment_ids"][0, row].max() + 1):
                spoken[
                    batch["tokens"][0, row][batch["segment_ids"][0, row] == segment].tobytes()
                ] += 1
    codec = CountingCodec()
    for index in set(range(16)) - {2, 9}:
        utterance = replace(good.utterance(index), codes=codec.encode([good.wave(index)])[0])
        assert spoken.pop(prompter.example(utterance).tokens.tobytes()) > 1
    assert not spoken


def test_too_many_bad_clips_stop_it(manifest, prompter):
    audio = ManifestAudio(manifest)
    for index in range(5):
        path = Path(audio.key(index)[0])
        path.write_bytes(path.read_bytes()[:3000])
    encoder, clips = encoder_of(audio)
    with (
        encoder,
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(UserError, match="4 clips of audio are bad"),
    ):
        online(encoder, clips, prompter, 9)


def test_dead_readers_are_replaced(manifest, prompter, offline, tmp_path):
    encoder, clips = encoder_of(SlowAudio(manifest, kills={3: 1, 4: 2}, folder=tmp_path))
    with encoder:
        same([b for b, _ in online(encoder, clips, prompter, 4)], [b for b, _ in offline(4)])
    assert len(encoder.skipped) == 0
    assert sorted(path.name for path in tmp_path.glob("[34].*")) == ["3.0", "4.0", "4.1"]


def test_a_reader_imports_little():
    program = (
        "import sys, llasa_jax.encode.sources\nprint(*{name.split('.')[0] for name in sys.modules})"
    )
    imported = set(
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.split()
    )
    assert "soundfile" in imported
    assert not imported & {
        "jax",
        "torch",
        "transformers",
        "tensorflow_datasets",
        "grain",
        "datasets",
        "scipy",
    }


@pytest.fixture
def one_reader(manifest):
    """A reading process, and what kills it while it starts."""
    others = set(multiprocessing.active_children())
    readers = Readers([ManifestAudio(manifest)], 1)
    readers.submit((0, 3))

    def kill():
        (process,) = set(multiprocessing.active_children()) - others
        process.kill()
        return readers.receive(60.0)

    yield readers, kill
    readers.close()


def test_readers_are_not_sent_the_manifest(manifest):
    """With texts of a million clips, each process would hold hundreds of MB."""
    source = ManifestAudio(manifest)
    assert len(pickle.dumps((source.waves(), source.place(0)))) < 1000
    np.testing.assert_array_equal(source.waves().wave(source.place(3)), source.wave(3))


def test_a_reader_that_dies_as_it_starts_is_no_clips_fault(one_reader):
    readers, kill = one_reader
    assert [kill() for _ in range(CHANCES + 1)] == [[]] * (CHANCES + 1)
    while not (received := readers.receive(60.0)):
        pass
    assert [(key, reason) for key, _, reason in received] == [((0, 3), "")]


def test_readers_that_cannot_start_are_told(one_reader):
    _, kill = one_reader
    assert [kill() for _ in range(STARTS - 1)] == [[]] * (STARTS - 1)
    with pytest.raises(
        RuntimeError,
        match=(
            f"{STARTS} processes that read audio died as they started, the last with exit code -9"
        ),
    ):
        kill()


@pytest.mark.filterwarnings("ignore:training has waited")
def test_a_stalled_source_is_told(manifest, prompter):
    encoder, clips = encoder_of(
        SlowAudio(manifest, late=dict.fromkeys(range(16), 1.5)), stall_seconds=0.4
    )
    with (
        encoder,
        pytest.warns(
            UserWarning, match=r"the data source is stalled: reading .*flac has taken \d s so far"
        ),
    ):
        online(encoder, clips, prompter, 1)


def test_what_ends_the_thread_ends_training_with_its_traceback(manifest, prompter):
    class Broken(CountingCodec):
        def encode(self, waves):
            raise ZeroDivisionError("in the codec")

    encoder, clips = encoder_of(ManifestAudio(manifest), Broken())
    with encoder, pytest.raises(ZeroDivisionError) as caught:
        online(encoder, clips, prompter, 1)
    assert "_work" in [entry.name for entry in caught.traceback]
    assert caught.traceback[-1].path == Path(__file__)


def test_a_codec_out_of_memory_says_what_to_do(manifest, prompter):
    class Small(CountingCodec):
        def encode(self, waves):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    encoder, clips = encoder_of(ManifestAudio(manifest), Small())
    with encoder, pytest.raises(UserError, match="raise data.online.gpu_memory"):
        online(encoder, clips, prompter, 1)


def test_devices_that_wait_are_advised(manifest, prompter):
    encoder, clips = encoder_of(ManifestAudio(manifest))
    with encoder:
        made = OnlineBatches(encoder, [Source(clips, prompter)], SHAPE, **OPTIONS)
        told = [made.advice(0.4) for _ in range(30)]
        assert [*filter(None, told)] == [told[19]]
        assert (
            "wait 40% of the time for the encoder; it would help to set data.online.cache"
            in told[19]
        )


def test_the_queue_bounds_what_is_made(manifest, prompter):
    codec = CountingCodec()
    encoder, clips = encoder_of(ManifestAudio(manifest), codec, queue=1)
    with encoder:
        made = OnlineBatches(encoder, [Source(clips, prompter)], SHAPE, **OPTIONS)
        next(made)
        time.sleep(1)
        held = len(codec.seen)
        time.sleep(1)
        assert len(codec.seen) == held
        assert made.numbers()["queue_depth"] == 1


def test_the_order_is_that_of_records_in_many_files(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "RECORDS_A_FILE", 5)
    encode(manifest, tmp_path / "codes", CountingCodec(), validation_share=0.3)
    assert len(list((tmp_path / "codes").glob("*train.array_record*"))) > 1
    audio = ManifestAudio(manifest, validation_share=0.3)
    for split in ("train", "validation"):
        ids = [utterance.id for utterance in open_utterances(tmp_path / "codes", split)]
        assert [audio.utterance(i).id for i in audio.split(split)] == ids
    with pytest.raises(UserError, match="no split 'test', it has train, validation"):
        audio.split("test")
    with pytest.raises(UserError, match="set data.online.validation_share"):
        ManifestAudio(manifest).split("validation")


def test_doctor_and_preview(manifest, model, tmp_path, monkeypatch):
    monkeypatch.setattr("llasa_jax.inspect.preview.load_codec", lambda *_: CountingCodec())
    data = {"path": str(manifest), "mode": "online", "max_length": 512}
    settings = settings_for(model, tmp_path / "run", data=data)
    assert [
        str(finding)
        for finding in doctor(settings)
        if "16 headers" in finding.message and finding.severity == "ok"
    ]
    shown = io.StringIO()
    preview(
        settings,
        open_sources(settings.sources, settings.data.online)[0],
        2,
        as_json=True,
        out=shown,
    )
    encode(manifest, tmp_path / "codes", CountingCodec())
    offline = settings_for(
        model, tmp_path / "run", data={"path": str(tmp_path / "codes"), "max_length": 512}
    )
    wanted = io.StringIO()
    preview(offline, open_sources(offline.sources)[0], 2, as_json=True, out=wanted)
    assert shown.getvalue().count("\n") == 2
    assert shown.getvalue() == wanted.getvalue()
    Path(ManifestAudio(manifest).key(3)[0]).write_bytes(b"")
    with pytest.warns(UserWarning, match="0 bytes"):
        assert [f for f in doctor(settings) if f.check == "audio"][0].severity == "bad"


def test_a_source_may_be_online_beside_one_that_is_not(
    manifest, offline, model, prompter, tmp_path
):
    offline(1)
    listed = [
        SourceSettings(str(manifest), mode="online", weight=0.7),
        SourceSettings(str(tmp_path / "codes"), weight=0.3),
    ]
    settings = settings_for(
        model,
        tmp_path / "run",
        data={"path": "", "sources": listed, "online": OnlineSettings(torch_threads=1)},
    )
    records, validation = open_sources(settings.sources, settings.data.online)
    codec = CountingCodec()
    assert codec_of(settings.sources, codec)["fingerprint"] == "f1"
    with pytest.raises(UserError, match="encode both with the same codec"):
        codec_of(settings.sources, CountingCodec(fingerprint="f2"))
    with open_encoder(settings.data.online, records, validation, codec) as encoder:
        mixed = [
            Source(one, prompter, weight) for one, weight in zip(records, (0.7, 0.3), strict=True)
        ]
        found = OnlineBatches(encoder, mixed, SHAPE, **OPTIONS)
        both = [
            Source(open_utterances(tmp_path / "codes", "train"), prompter, weight)
            for weight in (0.7, 0.3)
        ]
        wanted = iter(batches(both, SHAPE, **OPTIONS))
        same([next(found) for _ in range(4)], [next(wanted) for _ in range(4)])


def test_hosts_keep_journals_of_their_own_until_the_next_start(manifest, tmp_path, monkeypatch):
    audio, codec = ManifestAudio(manifest), CountingCodec()
    splits = {"train": audio.split("train")}
    codes = codec.encode([audio.wave(i) for i in range(16)])
    monkeypatch.setattr(hosts, "largest", int)

    def open_on(host, count=2):
        monkeypatch.setattr(jax, "process_index", lambda: host)
        monkeypatch.setattr(jax, "process_count", lambda: count)
        return CodesCache(tmp_path / "cache", audio, splits, codec)

    first, second = open_on(0), open_on(1)
    first.put([(i, codes[i]) for i in range(9)])
    second.put([(i, codes[i]) for i in range(8, 15)])
    assert second.get(0) is None
    for cache in (first, second):
        cache.close()
    first = open_on(0)
    for i in range(15):
        np.testing.assert_array_equal(first.get(i), codes[i])
    assert first.get(15) is None
    os.utime(audio.key(3)[0], ns=(1, 1))
    assert first.get(3) is None
    first.put([(3, codes[3])])
    first.finish(set())
    assert not (tmp_path / "cache").exists()
    first.close()
    alone = open_on(0, count=1)
    with pytest.raises(UserError, match="in use"):
        open_on(0, count=1)
    alone.finish({15})
    alone.close()
    ids = {
        utterance.id: utterance.codes for utterance in open_utterances(tmp_path / "cache", "train")
    }
    np.testing.assert_equal(ids, {audio.utterance(i).id: codes[i] for i in range(15)})
    with pytest.raises(UserError, match="another codec than counting"):
        CodesCache(tmp_path / "cache", audio, splits, CountingCodec(fingerprint="f2"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("queue", 0), ("stall_seconds", 0.0), ("max_bad_share", 1.0), ("gpu_memory", -0.1)],
)
def test_settings_that_cannot_work(model, tmp_path, name, value):
    with pytest.raises(UserError, match=f"data.online.{name} "):
        settings_for(model, tmp_path, data={"online": OnlineSettings(**{name: value})})


def test_a_shared_gpu_is_divided(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    share_gpu(OnlineSettings(device="cpu"))
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    share_gpu(OnlineSettings(device="cuda:0", gpu_memory=0.3))
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.65"


@pytest.mark.parametrize("place", ["run", "", "run/codes", "link/codes", "run/../run/"])
def test_a_cache_in_or_around_the_run_is_refused(manifest, model, tmp_path, place):
    """A cache's folder is replaced when all codes are there: a run in it would be deleted."""
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "runs/link").symlink_to(tmp_path / "runs/run")
    online = OnlineSettings(cache=str(tmp_path / "runs" / place))
    settings = settings_for(
        model, tmp_path / "runs/run", data={"path": str(manifest), "mode": "online"}
    )
    records, validation = open_sources(settings.sources, online)
    with pytest.raises(UserError, match=r"data.online.cache=.* must not lie in each other"):
        open_encoder(online, records, validation, CountingCodec(), out=settings.out)


def test_a_run_named_like_a_caches_journal_is_refused(tmp_path):
    for suffix in (".partial", ".fresh"):
        with pytest.raises(UserError, match="must not lie in each other"):
            check_place(tmp_path / "codes", tmp_path / f"codes{suffix}")
    check_place(tmp_path / "codes", tmp_path / "codes2")


@pytest.mark.parametrize("folder", ["cache", "cache.partial", "cache.fresh"])
def test_a_folder_that_holds_anything_else_is_no_cache(manifest, tmp_path, folder):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "thesis.tex").write_text("x")
    audio = ManifestAudio(manifest)
    with pytest.raises(UserError, match=r"holds thesis.tex, which no cache of codes holds"):
        CodesCache(tmp_path / "cache", audio, {"train": audio.split("train")}, CountingCodec())
    assert (tmp_path / folder / "thesis.tex").read_text() == "x"


def test_a_cache_that_the_first_host_refuses_stops_all(manifest, tmp_path, monkeypatch):
    """In two threads as two hosts: none waits for another that has gone."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/thesis.tex").write_text("x")
    audio, here = ManifestAudio(manifest), threading.local()
    barrier, values = threading.Barrier(2, timeout=20), [0, 0]

    def largest(value):
        values[here.host] = int(value)
        barrier.wait()
        most = max(values)
        barrier.wait()
        return most

    monkeypatch.setattr(hosts, "largest", largest)
    monkeypatch.setattr(jax, "process_index", lambda: here.host)
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def open_on(host):
        here.host = host
        splits = {"train": audio.split("train")}
        with pytest.raises(UserError) as caught:
            CodesCache(tmp_path / "cache", audio, splits, CountingCodec())
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(open_on, range(2))
    assert "holds thesis.tex" in first
    assert "the first host cannot use data.online.cache" in second


def test_damaged_codes_in_the_cache_are_made_anew(manifest, tmp_path):
    audio, codec = ManifestAudio(manifest), CountingCodec()
    codes = codec.encode([audio.wave(i) for i in range(3)])
    splits = {"train": range(3)}
    cache = CodesCache(tmp_path / "cache", audio, splits, codec)
    cache.put([*enumerate(codes)])
    cache.close()
    with closing(sqlite3.connect(tmp_path / "cache.partial/journal.sqlite")) as journal, journal:
        journal.execute("UPDATE codes SET codes = zeroblob(length(codes)) WHERE id = 'ada_02'")
    cache = CodesCache(tmp_path / "cache", audio, splits, codec)
    damaged = [audio.ids[i] == "ada_02" for i in range(3)]
    assert [cache.get(i) is None for i in range(3)] == damaged
    assert sum(damaged) == 1
    cache.close()


@pytest.mark.parametrize(
    ("device", "visible", "fraction"),
    [("cuda:7", "0,1", None), ("cuda:1", "0,1", "0.75"), ("cuda", "all", "0.75")],
)
def test_only_a_gpu_that_jax_uses_is_divided(monkeypatch, device, visible, fraction):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    monkeypatch.setenv("JAX_CUDA_VISIBLE_DEVICES", visible)
    share_gpu(OnlineSettings(device=device))
    assert os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") == fraction


# Training


def opened(model, out, manifest, codec, cache, **changes):
    """An encoder for a run with a validation split, and what begins the run."""
    online = OnlineSettings(
        workers=1, torch_threads=1, validation_share=0.2, queue=2, cache=str(cache)
    )
    data = {
        "path": str(manifest),
        "mode": "online",
        "max_length": 512,
        "validation_split": "validation",
        "online": online,
    }
    settings = settings_for(model, out, data=data, **changes)
    records, validation = open_sources(settings.sources, online)
    encoder = open_encoder(settings.data.online, records, validation, codec)
    return encoder, lambda: train(
        settings, records, validation, codec_of(settings.sources, codec), encoder=encoder
    )


@pytest.mark.soak
def test_training_online_with_the_codec_in_jax_is_training_offline(
    model, codec_folder, manifest, tmp_path
):
    """Codes of PyTorch's codec offline, and of JAX's on two of the devices that train, online."""
    encode(manifest, tmp_path / "codes", load_codec(codec_folder), validation_share=0.2)
    split = {"max_length": 512, "validation_split": "validation"}
    settings = settings_for(
        model, tmp_path / "offline", data={"path": str(tmp_path / "codes"), **split}
    )
    train(settings, *open_sources(settings.sources))

    online = OnlineSettings(
        codec=str(codec_folder), device="jax:6,2", workers=1, validation_share=0.2, queue=2
    )
    data = {"path": str(manifest), "mode": "online", "online": online, **split}
    settings = settings_for(model, tmp_path / "online", data=data)
    records, validation = open_sources(settings.sources, online)
    encoder = open_encoder(online, records, validation)
    assert list(encoder.codec._mesh.devices) == [jax.devices()[6], jax.devices()[2]]
    train(settings, records, validation, codec_of(settings.sources, encoder.codec), encoder=encoder)
    found, wanted = lines_of(tmp_path / "online"), lines_of(tmp_path / "offline")
    for name in ("loss", "validation_loss"):
        assert {x["step"]: x[name] for x in found if name in x} == {
            x["step"]: x[name] for x in wanted if name in x
        }
    assert len(losses(tmp_path / "online")) == 6


def test_training_online_is_training_offline(
    model, codec_folder, manifest, prompter, tmp_path, monkeypatch, capsys
):
    """Eight devices, AdamW, validation; online with a cache, stopped in the middle and gone on
    with.
    """
    codec = load_codec(codec_folder)
    encode(manifest, tmp_path / "codes", codec, validation_share=0.2)
    data = {"path": str(tmp_path / "codes"), "max_length": 512, "validation_split": "validation"}
    settings = settings_for(model, tmp_path / "offline", data=data)
    train(settings, *open_sources(settings.sources))

    real_place, count = TrainStep.place, iter(range(100))

    def place(*args):
        if (
            next(count) == 5
        ):  # three steps, the validation after them, one more, and the batch of another
            os.kill(os.getpid(), signal.SIGTERM)
        return real_place(*args)

    monkeypatch.setattr(TrainStep, "place", place)
    with pytest.raises(SystemExit) as stop:
        opened(model, tmp_path / "online", manifest, codec, tmp_path / "cache")[1]()
    assert stop.value.code == 128 + signal.SIGTERM
    assert "after step 4, which is saved" in capsys.readouterr().out
    opened(model, tmp_path / "online", manifest, codec, tmp_path / "cache")[1]()
    found, wanted = lines_of(tmp_path / "online"), lines_of(tmp_path / "offline")
    for name in ("loss", "grad_norm", "validation_loss"):
        assert {x["step"]: x[name] for x in found if name in x} == {
            x["step"]: x[name] for x in wanted if name in x
        }
    assert len(losses(tmp_path / "online")) == 6
    assert {"queue_depth", "encoded_seconds_per_second", "skipped_clips"} <= found[0].keys()

    # The cache is what `encode` made, and needs no codec any more.
    for split in ("train", "validation"):
        ones, others = (open_dataset(tmp_path / folder, split) for folder in ("cache", "codes"))
        np.testing.assert_equal([*ones], [*others])

    class Unneeded:
        name, fingerprint, hop, sample_rate = codec.name, codec.fingerprint, 320, 16_000

    with opened(model, tmp_path / "again", manifest, Unneeded(), tmp_path / "cache")[0] as encoder:
        clips, _ = encoder.splits
        source = Source(open_utterances(tmp_path / "codes", "train"), prompter)
        wanted = iter(batches([source], SHAPE, **OPTIONS))
        same(
            [batch for batch, _ in online(encoder, clips, prompter, 9)],
            [next(wanted) for _ in range(9)],
        )
    with pytest.raises(UserError, match="another codec than counting"):
        opened(model, tmp_path / "other", manifest, CountingCodec(), tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache.partial")
    with pytest.raises(UserError, match="train on it with data.mode=offline"):
        opened(model, tmp_path / "other", manifest, codec, tmp_path / "cache")
