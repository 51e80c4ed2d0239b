"""Audio from Hugging Face's and TFDS's datasets: TFDS's own builders, with few clips; the same
clips as from files.
"""

import importlib.resources
import importlib.resources.abc
import io
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds
from tensorflow_datasets.core.features import audio_feature
from tensorflow_datasets.datasets.librispeech import librispeech_dataset_builder as librispeech
from tensorflow_datasets.datasets.ljspeech import ljspeech_dataset_builder as ljspeech

from llasa_jax.data.manifest import assign_splits
from llasa_jax.encode.readers import Readers
from llasa_jax.encode.settings import OnlineSettings
from llasa_jax.encode.sources import open_audio
from llasa_jax.errors import UserError
from llasa_jax.speech.audio import read_audio

PLAIN = OnlineSettings()


def tone(index: int, rate: int = 22050) -> np.ndarray:
    return (np.sin(np.arange(4000 + 331 * index) * (0.05 + 0.01 * index)) * 12000).astype(np.int16)


def write_wav(path: Path, wave: np.ndarray, rate: int) -> Path:
    soundfile.write(path, wave, rate, subtype="PCM_16")
    return path


def prepare(
    builder_class, monkeypatch, data_dir: Path, splits: dict[str, list[dict]], **options
) -> Path:
    """Runs one of TFDS's own builders on these examples. Its audio feature asks TensorFlow for the
    name of a type; NumPy's will do.
    """
    monkeypatch.setattr(
        audio_feature, "tf", SimpleNamespace(dtypes=SimpleNamespace(as_dtype=np.dtype))
    )
    monkeypatch.setattr(audio_feature.Audio, "dtype", property(lambda self: self.np_dtype))
    monkeypatch.setitem(
        sys.modules, "importlib_resources", importlib.resources
    )  # which TFDS wants of old Pythons too
    examples = {
        split: [(example["id"], example) for example in rows] for split, rows in splits.items()
    }
    monkeypatch.setattr(builder_class, "_split_generators", lambda self, manager: examples)
    builder = builder_class(data_dir=data_dir, **{"file_format": "array_record"} | options)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    monkeypatch.undo()  # reading must do without
    return Path(builder.data_path)


@pytest.fixture
def lj(tmp_path, monkeypatch):
    rows = [
        {"id": f"LJ{i}", "speech": tone(i), "text": f"no. {i}", "text_normalized": f"number {i}"}
        for i in range(6)
    ]
    return prepare(ljspeech.Builder, monkeypatch, tmp_path / "tfds", {"train": rows})


def test_ljspeech_of_tfds(lj, tmp_path, monkeypatch):
    source = pickle.loads(pickle.dumps(open_audio(str(lj), OnlineSettings(validation_share=0.3))))
    assert len(source) == 6
    assert source.columns == {"audio": "speech", "text": "text_normalized"}
    seen = set()
    for index in range(6):
        utterance = source.utterance(index)
        number = int(utterance.text.removeprefix("number "))
        seen.add(number)
        assert utterance.codes is None
        wave = source.wave(index)
        np.testing.assert_array_equal(
            wave, read_audio(write_wav(tmp_path / "one.wav", tone(number), 22050))
        )
        assert source.samples(index) == len(wave)
    assert seen == set(range(6))
    train, validation = source.split("train"), source.split("validation")
    assert sorted([*train, *validation]) == list(range(6))
    ids = [source.utterance(i).id for i in range(6)]
    clips = [SimpleNamespace(id=row_id, split="") for row_id in ids]
    assert {ids[i] for i in validation} == {
        row_id for row_id, split in assign_splits(clips, 0.3, 0).items() if split == "validation"
    }
    assert len({source.key(i) for i in range(6)}) == 6
    with pytest.raises(UserError, match="no split 'test', it has train, validation"):
        source.split("test")
    # by its name, in TFDS's own folder; and with columns
    monkeypatch.setattr(
        "tensorflow_datasets.core.utils.file_utils.list_data_dirs",
        lambda **_: [str(tmp_path / "tfds")],
    )
    named = open_audio("tfds:ljspeech", OnlineSettings(columns="audio=speech,text=text,id=id"))
    assert sorted((named.utterance(i).id, named.utterance(i).text) for i in range(6)) == [
        (f"LJ{i}", f"no. {i}") for i in range(6)
    ]


def test_reading_processes_read_tfds(lj):
    source = open_audio(str(lj), PLAIN)
    readers = Readers([source], 1)
    readers.submit((0, 3))
    while not (received := readers.receive(1.0)):
        pass
    readers.close()
    ((key, wave, reason),) = received
    assert (key, reason) == ((0, 3), "")
    np.testing.assert_array_equal(wave, source.wave(3))


def test_librispeech_of_tfds_has_speakers_and_splits(tmp_path, monkeypatch):
    def rows(first):
        return [
            {
                "id": f"{i}-0",
                "speech": tone(i),
                "text": f"TEXT {i}",
                "speaker_id": 100 + i,
                "chapter_id": 1,
            }
            for i in range(first, first + 3)
        ]

    config = next(
        config for config in librispeech.Builder.BUILDER_CONFIGS if config.name == "default"
    )
    folder = prepare(
        librispeech.Builder,
        monkeypatch,
        tmp_path,
        {"train_clean100": rows(0), "dev_clean": rows(3)},
        config=config,
    )
    source = open_audio(f"tfds:{folder}", PLAIN)
    assert len(source) == 6
    found = {
        source.utterance(i).text: source.utterance(i).speaker
        for i in source.split("train_clean100")
    }
    assert found == {f"TEXT {i}": str(100 + i) for i in range(3)}
    for index in source.split("dev_clean"):
        number = int(source.utterance(index).speaker) - 100
        np.testing.assert_allclose(source.wave(index), tone(number) / 2**15, atol=1e-7)


def test_audio_that_tfds_keeps_as_files(lj, tmp_path):
    """`librispeech/lazy_decode` and its like hold FLAC, which TFDS would decode with TensorFlow."""

    class Lazy(tfds.core.GeneratorBasedBuilder):
        VERSION, code_path = tfds.core.Version("1.0.0"), Path(__file__)

        def _info(self):
            features = {
                "speech": tfds.features.Text(),
                "text": tfds.features.Text(),
                "who": tfds.features.ClassLabel(names=["ada", "bob"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            file = io.BytesIO()
            soundfile.write(file, tone(1), 22050, format="flac")
            yield "a", {"speech": file.getvalue(), "text": "Hello.", "who": "bob"}

    builder = Lazy(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    features = Path(builder.data_path) / "features.json"
    described = json.loads(features.read_text())
    audio = json.loads((lj / "features.json").read_text())["featuresDict"]["features"]["speech"]
    audio["audio"] |= {"lazyDecode": True, "fileFormat": "flac"}
    described["featuresDict"]["features"]["speech"] = audio
    features.write_text(json.dumps(described))

    source = open_audio(
        str(builder.data_path), OnlineSettings(columns="audio=speech,text=text,speaker=who")
    )
    assert source.utterance(0).speaker == "bob"
    np.testing.assert_array_equal(
        source.wave(0), read_audio(write_wav(tmp_path / "one.wav", tone(1), 22050))
    )
    assert source.samples(0) == len(source.wave(0))


def test_tfds_refusals(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"tfds build nosuchset --file_format=array_record"):
        open_audio("tfds:nosuchset", PLAIN)
    row = {"id": "a", "speech": tone(0), "text": "a", "text_normalized": "a"}
    folder = prepare(ljspeech.Builder, monkeypatch, tmp_path, {"train": [row]})
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="no random access"):
        open_audio(str(folder), PLAIN)


@pytest.fixture
def hf():
    return pytest.importorskip("datasets", reason="the package `datasets` is not installed")


def as_file(wave: np.ndarray, rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="wav", subtype="PCM_16")
    return file.getvalue()


def test_hf_audio(hf, tmp_path):
    sounds = [{"bytes": as_file(tone(i), 22050), "path": "x.wav"} for i in range(4)]
    sounds.append({"bytes": None, "path": str(write_wav(tmp_path / "five.wav", tone(4), 22050))})
    sounds += [{"bytes": b"RIFF....", "path": "x.wav"}, None, sounds[0]]
    table = hf.Dataset.from_dict(
        {"audio": sounds, "sentence": [*"abcdefg", " "], "speaker_id": list(range(8))}
    )
    table = table.cast_column("audio", hf.Audio())
    hf.DatasetDict({"train": table, "dev": table.select(range(2))}).save_to_disk(tmp_path / "saved")
    source = pickle.loads(pickle.dumps(open_audio(str(tmp_path / "saved"), PLAIN)))
    assert source.columns == {"audio": "audio", "text": "sentence", "speaker": "speaker_id"}
    assert (len(source), len(source.split("train")), len(source.split("validation"))) == (10, 8, 2)
    for index in range(5):
        utterance = source.utterance(index)
        assert (utterance.id, utterance.text, utterance.speaker) == (
            f"train_{index:08d}",
            "abcde"[index],
            str(index),
        )
        np.testing.assert_array_equal(
            source.wave(index), read_audio(write_wav(tmp_path / "one.wav", tone(index), 22050))
        )
        assert source.samples(index) == len(source.wave(index))
    for bad, words in ((5, "train row 5: not audio"), (6, "train row 6: no audio in 'audio'")):
        with pytest.raises(UserError, match=words):
            source.wave(bad)
        with pytest.raises(UserError, match=words):
            source.samples(bad)
    with pytest.raises(UserError, match="train row 7: no text in 'sentence'"):
        source.samples(7)

    def refused(words, columns, path="saved"):
        with pytest.raises(UserError, match=words):
            open_audio(str(tmp_path / path), OnlineSettings(columns=columns))

    refused(
        "no column 'voice' for text in 'train'; it has audio, sentence, speaker_id",
        "audio=audio,text=voice",
    )
    refused("data.online.columns codes=a,text=b names codes", "codes=a,text=b")
    refused("data.online.columns text is no map", "text")
    refused("cannot be loaded", "", "nowhere")
    table.rename_column("sentence", "words").save_to_disk(tmp_path / "unusual")
    refused(
        "cannot be told from audio, words, speaker_id; name them in data.online.columns",
        "",
        "unusual",
    )
    table.add_column("key", list("aabcdefg")).save_to_disk(tmp_path / "shared")
    refused("rows share an id in the column 'key'", "audio=audio,text=sentence,id=key", "shared")
