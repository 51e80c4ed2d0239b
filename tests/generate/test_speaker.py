"""The whole way, from a folder to a wav, by the command line and by `Speaker`."""

import numpy as np
import pytest
import soundfile
from tiny_speech import GREEDY, TEXTS

from llasa_jax import cli
from llasa_jax.codec import load_codec
from llasa_jax.convert.model_folder import read_description, write_description
from llasa_jax.generate import speaker as generation
from llasa_jax.generate.decode import generate_codes
from llasa_jax.generate.sampling import SamplingSettings
from llasa_jax.generate.settings import SpeechSettings
from llasa_jax.generate.speaker import Line, Speaker
from llasa_jax.speech.audio import read_audio

FREE = SpeechSettings(fastest=1000, tail_seconds=3600)


@pytest.fixture
def say(folder, codec, tmp_path, capsys):
    """Runs `generate` with options, `None` for those that are left out, to out.wav. Returns the
    exit status and what was printed.
    """

    def run(**options):
        given = {
            "model": folder,
            "text": "dog",
            "out": "out.wav",
            "codec": codec,
            "dtype": "float32",
            "max_seconds": 0.3,
        } | options
        out = tmp_path / given.pop("out")
        words = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in given.items()
        ]
        status = cli.main(["generate", *words, f"--out={out}"])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def test_a_text_becomes_a_wav(folder, say, tmp_path):
    out = tmp_path / "out.wav"
    out.write_bytes(b"an older file")
    status, printed = say(text=TEXTS[0], temperature=0, fastest=1000, max_seconds=0, codes=True)
    codes = int((folder / "ends_after").read_text())
    assert status == 0
    file = soundfile.info(out)
    assert (file.samplerate, file.channels, file.frames) == (16_000, 1, 320 * codes)
    assert len(np.load(tmp_path / "out.npy")) == codes
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out.npy", out]
    assert "stopped by itself" in printed


def test_no_end_before_the_shortest_plausible_speech(folder, say, tmp_path):
    """The text takes 19 / 14 seconds to read; at most twice as fast are 34 codes or more."""
    codes = int((folder / "ends_after").read_text())
    assert codes < 34
    say(text=TEXTS[0], temperature=0, fastest=2, max_seconds=1.5, codes=True)
    assert 34 <= len(np.load(tmp_path / "out.npy")) <= 75


def test_cloning_gives_the_new_speech_alone(folder, codec, recording, say, tmp_path):
    status, printed = say(
        text=TEXTS[1],
        temperature=0,
        max_seconds=0.4,
        prompt_text="she said",
        prompt_audio=recording,
        speaker="kore",
        step=1,
        tail_seconds=3600,
        codes=True,
    )
    assert status == 0
    result = np.load(tmp_path / "out.npy")
    graphdef, params, prompter, _ = generation.load(folder, "float32", step=1)
    voice = load_codec(codec)
    heard = voice.encode([np.asarray(read_audio(recording))])[0]
    prompt = prompter.opening(TEXTS[1], speaker="kore", prompt_text="she said", prompt_codes=heard)
    assert prompter.settings.user == "Say:{text}"
    assert len(heard) == 51
    (expected,) = generate_codes(graphdef, params, [prompt], prompter.vocab, 20, GREEDY)
    np.testing.assert_array_equal(result, expected.codes)
    assert len(set(result.tolist())) > 5
    assert len(result) == 20
    assert "cut at 20 tokens" in printed
    in_context = voice.decode(np.concatenate([heard, result]))[51 * 320 :]
    np.testing.assert_allclose(
        read_audio(tmp_path / "out.wav"), np.clip(in_context, -1, 1), atol=2 / 32768
    )


def test_bfloat16_with_any_token_allowed(say, tmp_path):
    status, _ = say(
        text=TEXTS[2],
        out="out.flac",
        any_token=True,
        temperature=3.0,
        max_seconds=1,
        dtype="bfloat16",
        codes=True,
        tail_seconds=3600,
    )
    assert status == 0
    codes = np.load(tmp_path / "out.npy")
    assert 0 < len(codes) <= 50  # others may be text
    assert len(read_audio(tmp_path / "out.flac")) == 320 * len(codes)


def test_two_devices_share_the_weights(say, tmp_path):
    for tensor in (1, 2):
        say(temperature=0, tensor=tensor, codes=True, out=f"{tensor}.wav")
    one, two = (np.load(tmp_path / f"{tensor}.npy") for tensor in (1, 2))
    np.testing.assert_array_equal(one, two)
    assert len(one) == 15


def test_a_search_with_a_scorer_by_name(say, tmp_path):
    """Of four samples the one that the scorer puts first, not that of the first random numbers."""
    from llasa_jax.evaluate.scorers import load_scorer

    name = next(iter(load_scorer("levels").higher_is_better))
    status, _ = say(search="best-of:4", rows=2, scorer="levels", temperature=3.0)
    assert status == 0
    best = read_audio(tmp_path / "out.wav")
    sign = 1 if load_scorer("levels").higher_is_better[name] else -1
    score = sign * load_scorer("levels")([best], ["dog"], [None])[name][0]
    say(search="best-of:1", temperature=3.0)
    first = read_audio(tmp_path / "out.wav")
    assert score >= sign * load_scorer("levels")([first], ["dog"], [None])[name][0]


def test_no_speech_at_all_is_an_error_and_no_file(say, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Speaker,
        "say",
        lambda *_, **__: [(0, generation.Speech(np.empty(0), np.empty(0), True, 1, 0.0))],
    )
    status, printed = say()
    assert status == 2
    assert "ended before any speech" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "nowhere/out.wav"}, "nowhere does not exist"),
        ({"out": "out.xyz"}, "not written as .xyz"),
        ({"out": ""}, "is a folder"),
        ({"max_seconds": "nan"}, "max-seconds"),
        ({"prompt_text": "she said"}, "without prompt audio"),
        ({"prompt_audio": "voice.wav"}, "transcript"),
        ({"prompt_audio": "voice.wav", "prompt_text": " "}, "transcript"),
        ({"prompt_audio": "absent.wav", "prompt_text": "she said"}, "absent.wav: no such"),
        ({"text": " "}, "no text"),
        ({"text": "a<|eot_id|>b"}, "control token"),
        ({"model": "absent"}, "absent"),
        ({"codec": "absent/codec/folder"}, "no such codec"),
        ({"step": 7}, "no checkpoint of step 7"),
        ({"tensor": 9}, "there are 8; choose 1 to 8"),
        ({"speaker": "x" * 100_000}, "speaker has 100,000 characters"),
        ({"language": " en"}, "blanks at its ends"),
        ({"scorer": "pocketsphinx"}, "give --search"),
        ({"search": "worst-of:8"}, "the search 'worst-of:8' is unknown"),
        ({"search": "best-of:8", "temperature": 0}, "at temperature 0 all are the same"),
        ({"normalize": "xx"}, "cannot be normalized; choose one of ar, de, en"),
        ({"lines": "absent.jsonl"}, "give one --out, the folder, and no --text"),
    ],
)
def test_bad_requests_are_refused_and_leave_no_file(say, tmp_path, change, message):
    status, printed = say(**change)
    assert status == 2
    assert "llasa-jax: error: " in printed
    assert message in printed
    assert not list(tmp_path.iterdir())


def test_two_texts_need_two_files(folder, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path)
    texts = ["--text=dog", f"--out={tmp_path / 'out.wav'}"] * 2
    texts[-1] = f"--out={tmp_path / 'link' / 'out.wav'}"
    assert cli.main(["generate", f"--model={folder}", *texts]) == 2
    assert "out.wav is given twice as the file to write" in capsys.readouterr().err


def test_a_codec_that_the_model_was_not_trained_with(folder, say, tmp_path):
    """`generate` refuses it before it says anything, and takes the one that the model knows, or any
    where it knows none.
    """
    config, source = read_description(folder)
    run = tmp_path / "run"
    run.mkdir()
    for part in folder.iterdir():
        (run / part.name).symlink_to(part)
    (run / "model.json").unlink()
    write_description(
        run, config, {**source, "codec": {"codec": "their/codec", "fingerprint": "f00d"}}
    )
    status, printed = say(model=run)
    assert status == 2
    assert "codes of their/codec" in printed
    assert not (tmp_path / "out.wav").exists()
    write_description(
        run, config, {**source, "codec": {"codec": "unknown", "fingerprint": "unknown"}}
    )
    assert say(model=run)[0] == 0


@pytest.fixture(scope="module")
def speaker(folder, codec):
    return Speaker.load(folder, codec=codec, dtype="float32", step=1, rows=2)


def test_a_program_speaks_many_texts_with_one_speaker(speaker):
    """More texts than rows; each is said as it is said alone, and the same seed says it again."""
    sampling = SamplingSettings(temperature=3.0)
    settings = SpeechSettings(max_seconds=0.5, tail_seconds=3600)
    lines = [Line(f"{text} {number}", id=str(number)) for number, text in enumerate(TEXTS * 2)]
    said = dict(speaker.say(lines, sampling, settings))
    assert sorted(said) == list(range(6))
    for place in (1, 4):
        ((_, alone),) = speaker.say([lines[place]], sampling, settings)
        np.testing.assert_array_equal(said[place].codes, alone.codes)
        assert said[place].logprob == pytest.approx(alone.logprob, rel=1e-4)
    waves = speaker.speak(lines[:2], sampling, settings)
    np.testing.assert_array_equal(waves[1], said[1].wave)
    assert waves[0].dtype == np.float32
    assert {len(said[place].wave) for place in range(6)} == {25 * 320}


def test_a_long_text_is_spoken_in_pieces(speaker):
    """Each after the codes and the text of the one before it, and without a jump between them."""
    text = "The quick brown fox is here. Nothing else was true. The dog is over there."
    settings = SpeechSettings(max_seconds=0.4, piece_seconds=2, tail_seconds=3600)
    ((_, said),) = speaker.say([Line(text, speaker="kore")], GREEDY, settings)
    parts = ["The quick brown fox is here.", "Nothing else was true.", "The dog is over there."]
    pieces = said.codes.reshape(3, 20)
    prompter = speaker._prompters[0]
    for at, part in enumerate(parts):
        before = {"prompt_text": parts[at - 1], "prompt_codes": pieces[at - 1]} if at else {}
        prompt = prompter.opening(part, speaker="kore", **before)
        (expected,) = generate_codes(
            speaker._graphdef, speaker.params, [prompt], speaker.vocab, 20, GREEDY
        )
        np.testing.assert_array_equal(pieces[at], expected.codes)
    assert len(said.wave) == 60 * 320
