"""Each disease is found, named with its clips, and nothing is said of the healthy."""

import json

import numpy as np
import pytest

from llasa_jax.cli import main
from llasa_jax.convert import model_folder
from llasa_jax.data.builder import write_dataset
from llasa_jax.demo.tiny_llama import make_tiny_tokenizer
from llasa_jax.encode.settings import DataSettings
from llasa_jax.errors import UserError
from llasa_jax.inspect.doctor import doctor, examine_before_training
from llasa_jax.inspect.model_checks import check_codec, check_tokenizer
from llasa_jax.inspect.record_checks import check_scans
from llasa_jax.inspect.scan import repeated_codes, scan, suspicious_pace
from llasa_jax.model.config import ModelConfig
from llasa_jax.model.settings import ModelSettings
from llasa_jax.speech.prompts import Utterance
from llasa_jax.train.settings import Settings

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "and",
    "nothing",
    "else",
    "that",
    "she",
    "said",
    "was",
    "ever",
    "true",
]


def speech(count, seed=0, pace=3.5, language="en", prefix="clip"):
    """Clips in which long texts take long, as read aloud, with a fifth of random haste."""
    rng = np.random.default_rng(seed)
    clips = []
    for i in range(count):
        text = " ".join(rng.choice(WORDS, rng.integers(3, 30)))
        frames = int(len(text) * pace * np.exp(rng.normal(0, 0.2))) + 10
        clips.append(
            Utterance(
                text,
                rng.integers(0, 65_536, frames).astype(np.uint16),
                f"{prefix}{i}",
                "ada",
                "",
                language,
            )
        )
    return clips


def changed(clip, **fields):
    return Utterance(
        **{
            **{
                name: getattr(clip, name) for name in ("text", "codes", "id", "speaker", "language")
            },
            **fields,
        }
    )


def sick(splits, prompter=None, **rest):
    """What is found in the splits, and is not ok, by check."""
    splits = splits if isinstance(splits, dict) else {"train": splits}
    findings = check_scans(
        {name: scan(clips, 10_000, prompter) for name, clips in splits.items()},
        **{"max_length": 2048, **rest},
    )
    return [(f.check, f.severity, f.ids) for f in findings if f.severity != "ok"]


def test_the_healthy_are_let_go(prompter):
    # A language that is spoken at half the bytes a second is healthy too.
    clips = speech(150) + speech(150, 1, 7.0, "ja", "jp")
    findings = check_scans(
        {
            "train": scan(clips, 10_000, prompter),
            "validation": scan(speech(20, 2, prefix="v"), 10_000, prompter),
        },
        2048,
    )
    assert {f.severity for f in findings} == {"ok"}
    assert {f.check for f in findings} == {"codes", "length", "duplicate", "leak", "pace"}


def test_codes_with_the_vocabularys_offset(prompter):
    clips = [changed(clip, codes=clip.codes.astype(np.int64) + 128_264) for clip in speech(20)]
    (codes,) = sick(clips)
    assert codes[:2] == ("codes", "bad")
    assert [check for check, severity, _ in sick(clips, prompter) if severity == "bad"] == [
        "prompt",
        "codes",
    ]


def test_constant_codes():
    clips = speech(300)
    still = [
        changed(clip, codes=np.full(len(clip.codes) + 50, 7, np.uint16) + i)
        for i, clip in enumerate(clips[:6])
    ]
    assert sick([*still[:1], *clips[1:]]) == [("codes", "warn", ("clip0",))]
    assert sick([*still, *clips[6:]]) == [("codes", "bad", ("clip0", "clip1", "clip2"))]


def test_codes_of_another_codec():
    clips = [changed(clip, codes=clip.codes % 500) for clip in speech(600)]
    assert [(check, severity) for check, severity, _ in sick(clips)] == [("codes", "bad")]


def test_duplicates():
    clips = speech(300)
    relabelled = [
        *clips,
        changed(clips[3], id="copy", text="another text of about the same length " * 2),
    ]
    assert ("duplicate", "warn", ("clip3", "copy")) in sick(relabelled)
    assert sick([*clips, changed(clips[3], id="copy")]) == [
        ("duplicate", "warn", ("clip3", "copy"))
    ]
    many = [changed(clip, codes=clips[0].codes) for clip in clips[:10]] + clips[10:]
    assert ("duplicate", "bad") in [found[:2] for found in sick(many)]
    assert repeated_codes([scan(clips, 999), scan(clips[:1], 999)]) == [[(0, 0), (1, 0)]]


def test_clips_that_do_not_fit(prompter):
    clips = speech(100)
    lengths = {clip.id: len(prompter.example(clip).tokens) for clip in clips}
    longest = sorted(lengths.values())[-3:]
    beyond = {clip for clip, length in lengths.items() if length > longest[0]}
    (found,) = sick(clips, prompter, max_length=longest[0])
    assert found[:2] == ("length", "warn")
    assert set(found[2]) == beyond
    (found,) = sick(clips, prompter, max_length=longest[0], too_long="cut")
    assert found[:2] == ("length", "warn")
    assert [found[:2] for found in sick(clips, prompter, max_length=64)] == [("length", "bad")]
    (message,) = [
        f.message
        for f in check_scans({"t": scan(clips, 999, prompter)}, longest[0], "cut")
        if f.severity != "ok"
    ]
    assert f"{len(beyond)} clips" in message
    assert "lose their end marker" in message


def test_leaks():
    clips, others = speech(300), speech(200, 1, prefix="v")
    assert sick(
        {
            "train": clips,
            "validation": [*others, changed(others[0], id="clip7", codes=others[0].codes + 1)],
        }
    )[-1] == (
        "leak",
        "warn",
        ("clip7",),
    )
    assert sick({"train": clips, "validation": [*others, changed(clips[5], id="renamed")]}) == [
        ("leak", "warn", ("renamed",))
    ]
    assert sick({"train": clips, "validation": clips[:50]}) == [
        ("leak", "bad", ("clip0", "clip1", "clip2"))
    ]


def test_pace():
    clips = speech(200)
    clips[4] = changed(clips[4], codes=np.arange(len(clips[4].text) * 15 + 200, dtype=np.uint16))
    clips[9] = changed(clips[9], text="much more than is said " * 40)
    assert sick(clips) == [("pace", "warn", ("clip4",)), ("pace", "warn", ("clip9",))]
    many, few = suspicious_pace([scan(clips[:5], 999), scan(clips[5:], 999)])
    assert [rows.tolist() for rows in (*many, *few)] == [[4], [], [], [4]]
    slipped = [
        changed(clip, text=other.text)
        for clip, other in zip(clips, clips[1:] + clips[:1], strict=True)
    ]
    assert [found[:2] for found in sick(slipped)] == [("pace", "bad")]


def test_texts_that_are_names_of_speakers_or_labels():
    clips = speech(150)
    mixed = [changed(clip, text=clip.speaker) for clip in clips]
    assert ("text", "bad", ("clip0", "clip1", "clip2")) in sick(mixed)
    assert ("text", "warn", ("clip0",)) in sick([changed(clips[0], text="ada"), *clips[1:]])
    # Without speakers' names to compare with, as in a dataset whose text column is the wrong one.
    names = [
        changed(clip, text=("alice", "bob")[i % 2], speaker="") for i, clip in enumerate(clips)
    ]
    (found,) = [f for f in check_scans({"t": scan(names, 999)}, 2048) if f.check == "text"]
    assert found.severity == "warn"
    assert "150 clips of t share 2 different texts; 75 of them say 'alice'" in found.message


def test_findings_do_not_steer_the_terminal():
    clips = [changed(clip, text=" ", id="a\x1b[2J") for clip in speech(30)]
    clips = [changed(clip, codes=clips[0].codes) for clip in clips]
    said = "\n".join(map(str, check_scans({"train": scan(clips, 999)}, 2048)))
    assert r"a\x1b[2J" in said
    assert "\x1b" not in said


def test_a_sample_has_clips(model, tmp_path):
    for sample in (0, -1):
        with pytest.raises(UserError, match=f"the sample is {sample} clips"):
            doctor(settings(model, tmp_path), sample=sample)


def test_texts_that_break_the_prompt(prompter):
    clips = speech(50)
    clips[2] = changed(clips[2], text="Hello <|eot_id|> you")
    clips[8] = changed(clips[8], text=" ")
    assert sick(clips, prompter)[0] == ("prompt", "bad", ("clip2", "clip8"))


@pytest.fixture
def model(tmp_path, tokenizer):
    config = ModelConfig(len(tokenizer), 64, 192, 2, 4, 2, 16)
    model_folder.write_description(tmp_path / "model", config, {})
    tokenizer.save_pretrained(tmp_path / "model/hf")
    hf = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [tokenizer.convert_tokens_to_ids("<|eot_id|>")],
    }
    (tmp_path / "model/hf/config.json").write_text(json.dumps(hf))
    return tmp_path / "model"


def test_a_tokenizer_that_is_not_the_models(model, tokenizer):
    assert [f.severity for f in check_tokenizer(model, tokenizer)] == ["ok"]
    assert [f.severity for f in check_tokenizer(model, make_tiny_tokenizer(["other words"]))] == [
        "warn"
    ]
    more = make_tiny_tokenizer()
    more.add_tokens(["<|one_more|>"])
    assert [f.severity for f in check_tokenizer(model, more)] == ["bad"]
    (model / "hf/config.json").write_text(json.dumps({"bos_token_id": 17, "eos_token_id": 3}))
    (finding,) = check_tokenizer(model, tokenizer)
    assert finding.severity == "bad"
    assert "bos_token_id 17" in finding.message


class Levels:
    """A codec whose codes are the sound's own levels, and sound its codes."""

    name, fingerprint, sample_rate, hop = "levels", "f1", 16000, 320

    def encode(self, waves):
        return [(wave[:: self.hop] * 30000 + 32768).astype(np.uint16) for wave in waves]

    def decode(self, codes):
        return np.repeat((codes.astype(np.float32) - 32768) / 30000, self.hop)


def test_codecs():
    class Random(Levels):
        rng = np.random.default_rng(0)

        def encode(self, waves):
            return [
                self.rng.integers(0, 65_536, len(wave) // 320).astype(np.uint16) for wave in waves
            ]

    class Silent(Levels):
        def decode(self, codes):
            return np.zeros(len(codes) * 320, np.float32)

    class Stuck(Levels):
        def encode(self, waves):
            return [np.full(len(wave) // 320, 5, np.uint16) for wave in waves]

    recorded = {"codec": "levels", "fingerprint": "f1"}
    (ok,) = check_codec(recorded, Levels())
    assert ok.severity == "ok"
    assert "100% of codes survive" in ok.message
    for codec, words in (
        (Random(), "second time"),
        (Silent(), "silence"),
        (Stuck(), "only 1 different codes"),
    ):
        (finding,) = check_codec(recorded, codec)
        assert finding.severity == "bad"
        assert words in finding.message
    (finding,) = check_codec({"codec": "theirs", "fingerprint": "f2"}, Levels())
    assert (finding.severity, "theirs (f2)" in finding.message) == ("bad", True)
    unknown = {"codec": "unknown", "fingerprint": "unknown"}
    assert [f.severity for codec in (None, Levels()) for f in check_codec(unknown, codec)] == [
        "warn",
        "warn",
    ]
    (finding,) = check_codec(recorded, "/no/such/codec")
    assert finding.severity == "bad"


def store(folder, **splits):
    fields = ("id", "text", "codes", "speaker", "description", "language")
    rows = {
        split: iter([{name: getattr(clip, name) for name in fields} for clip in clips])
        for split, clips in splits.items()
    }
    write_dataset(folder, rows, {"codec": "levels", "fingerprint": "f1"})


def settings(model, data, **rest):
    return Settings(
        out="run", model=ModelSettings(path=str(model)), data=DataSettings(path=str(data), **rest)
    )


@pytest.fixture
def at_hand(tokenizer, monkeypatch):
    """Loading 66,000 added tokens takes seconds, each time."""
    return lambda: monkeypatch.setattr(
        "llasa_jax.inspect.doctor.load_tokenizer", lambda folder: tokenizer
    )


@pytest.mark.slow
def test_the_whole_examination(tmp_path, model, at_hand, capsys):
    at_hand()
    store(tmp_path / "good", train=speech(60), validation=speech(10, 1, prefix="v"))
    findings = doctor(settings(model, tmp_path / "good", validation_split="validation"), Levels())
    assert {f.severity for f in findings} == {"ok"}
    assert {f.check for f in findings} == {
        "tokenizer",
        "records",
        "codes",
        "length",
        "duplicate",
        "leak",
        "pace",
        "codec",
    }
    looked = [
        f.message
        for f in doctor(settings(model, tmp_path / "good"), sample=7)
        if f.check == "records"
    ]
    assert looked == [f"looked at 7 of 60 clips of train in {tmp_path / 'good'}"]
    examine_before_training(settings(model, tmp_path / "good"))
    assert capsys.readouterr().out == ""

    with pytest.raises(UserError, match="validation_split is train, which is trained on too"):
        settings(model, tmp_path / "good", validation_split="train")
    (bad,) = [
        f
        for f in doctor(settings(model, tmp_path / "good", train_split="tests"))
        if f.severity == "bad"
    ]
    assert "no split 'tests'" in bad.message
    (bad,) = [f for f in doctor(settings(tmp_path, tmp_path / "good")) if f.severity == "bad"]
    assert bad.check == "tokenizer"
    next((tmp_path / "good").glob("*train*")).unlink()
    (bad,) = [f for f in doctor(settings(model, tmp_path / "good")) if f.severity == "bad"]
    assert "lacks llasa_speech-train" in bad.message


@pytest.mark.slow
def test_commands(tmp_path, model, at_hand, capsys, monkeypatch):
    clips = speech(60)
    store(tmp_path / "good", train=clips)
    store(tmp_path / "leaky", train=clips, validation=clips[:20])
    config = tmp_path / "c.yaml"
    config.write_text(
        f"out: {tmp_path / 'run'}\nmodel: {{path: {model}}}\ndata: {{path: {tmp_path / 'good'}}}\n"
    )
    leaky = [f"--data.path={tmp_path / 'leaky'}", "--data.validation_split=validation"]
    assert main(["doctor", "--config", str(config)]) == 0
    assert "ok    codes" in capsys.readouterr().out
    at_hand()
    assert main(["doctor", "--config", str(config), *leaky, "--json"]) == 1
    (bad,) = [f for f in json.loads(capsys.readouterr().out) if f["severity"] == "bad"]
    assert (bad["check"], len(bad["ids"])) == ("leak", 3)
    assert main(["doctor", "--config", str(config), "--data.paths=x"]) == 2

    trained = []
    monkeypatch.setattr("llasa_jax.train.prepare.prepare", lambda *given: given)
    monkeypatch.setattr("llasa_jax.train.loop.run", lambda *given, **_: trained.append(given))
    assert main(["train", "--config", str(config), *leaky]) == 2
    assert "the validation loss flatters" in capsys.readouterr().err
    assert not trained
    assert main(["train", "--config", str(config), *leaky, "--data.doctor=warn"]) == 0
    assert "doctor: bad   leak" in capsys.readouterr().out
    assert len(trained) == 1
    with pytest.raises(UserError, match="set data.doctor to warn"):
        examine_before_training(settings(model, tmp_path / "leaky", validation_split="validation"))
