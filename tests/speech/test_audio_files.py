"""Audio files of all kinds, made by ffmpeg, against ffmpeg's own decode: equal, or refused in one
true sentence, and as long as planned. Files that are cut short, joined, damaged or that lie.
"""

import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import soxr
from places import SPEECH

from llasa_jax.errors import UserError
from llasa_jax.speech import audio as audio_module
from llasa_jax.speech.audio import SAMPLE_RATE, audio_samples, read_audio

pytestmark = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="ffmpeg, the reference, is not installed (apt-get)"
)
CLIP = SPEECH / "ada_01.flac"  # 23,544 samples at 16 kHz
PIPE = "pipe"  # written to a pipe: the header cannot know the length

PCM = ("u8", "s16le", "s24le", "s32le", "f32le", "f64le", "alaw", "mulaw")
# Opus at 48 kHz: releases of FFmpeg skip the encoder's delay differently for other source rates.
KINDS = {
    **{f"{rate}.wav": f"-ar {rate}" for rate in (8000, 22050, 44100, 48000)},
    **{f"{c}.wav": f"-c:a pcm_{c}" for c in PCM},
    "stereo.wav": "-ac 2 -ar 44100",
    "six_channels.wav": "-ac 6",
    "adpcm_ms.wav": "-c:a adpcm_ms",
    "adpcm_ima.wav": "-c:a adpcm_ima_wav",
    "g726.wav": "-ar 8000 -c:a g726",
    "gsm.wav": "-ar 8000 -c:a libgsm_ms",
    "mp3_inside.wav": "-c:a libmp3lame",
    "rf64.wav": "-rf64 always",
    "plain.w64": "",
    "plain.aiff": "",
    "mulaw.aifc": "-f aiff -c:a pcm_mulaw",
    "plain.au": "",
    "plain.caf": "",
    "alac.caf": "-c:a alac",
    "plain.tta": "",
    "plain.wv": "",
    "plain.flac": "",
    "24_bits.flac": "-c:a flac -sample_fmt s32 -ar 48000",
    "stereo.flac": "-ac 2 -ar 44100",
    "flac.ogg": "-c:a flac",
    "vorbis.ogg": "-c:a libvorbis",
    "stereo.ogg": "-c:a libvorbis -ar 44100 -ac 2",
    "plain.opus": "",
    "low.opus": "-ar 48000 -b:a 16k",
    "speex.ogg": "-c:a libspeex",
    **{f"{rate}.mp3": f"-ar {rate} -b:a 32k" for rate in (8000, 16000, 22050, 44100, 48000)},
    "vbr.mp3": "-q:a 5 -ar 44100",
    "abr.mp3": "-abr 1 -b:a 64k",
    "joint_stereo.mp3": "-ac 2 -ar 44100",
    "no_xing.mp3": "-write_xing 0",
    "no_xing_vbr.mp3": "-write_xing 0 -q:a 2",
    "no_id3.mp3": "-id3v2_version 0",
    "id3v1.mp3": "-write_id3v1 1 -metadata title=x",
    "plain.mp2": "",
    "plain.m4a": "",
    "stereo.m4a": "-ar 44100 -ac 2",
    "fast_start.m4a": "-movflags +faststart",
    "alac.m4a": "-c:a alac",
    "m4a_named.mp3": "-f mp4 -c:a aac",
    "plain.mp4": "-c:a aac",
    "plain.mov": "-c:a pcm_s16le",
    "plain.3gp": "-ar 8000 -c:a aac",
    "plain.aac": "",
    "plain.ac3": "",
    "opus.webm": "-ar 48000",
    "vorbis.webm": "-c:a libvorbis",
    "opus.mka": "-ar 48000 -c:a libopus",
    "aac.mkv": "-c:a aac",
    "plain.wma": "",
    "v1.wma": "-c:a wmav1",
    "plain.asf": "-c:a wmav2",
    "plain.avi": "-c:a libmp3lame",
    "plain.ts": "-c:a aac",
    "plain.flv": "-c:a aac -ar 22050",
    "piped.wav": f"-f wav {PIPE}",
    "piped.au": f"-f au {PIPE}",
    "piped.flac": f"-f flac {PIPE}",
    "piped.ogg": f"-f ogg -c:a libvorbis {PIPE}",
    "piped.mp3": f"-f mp3 {PIPE}",
    "piped_vbr.mp3": f"-f mp3 -q:a 4 {PIPE}",
    "piped.aac": f"-f adts {PIPE}",
    "piped.webm": f"-ar 48000 -f webm {PIPE}",
    "piped.m4a": f"-f mp4 -movflags frag_keyframe+empty_moov -c:a aac {PIPE}",
    "plain.voc": "",
    "plain.ircam": "-f ircam",
    "plain.sox": "",
}
REFUSED = {
    "plain.voc": "the format VOC has no length to check",
    "plain.ircam": "the format IRCAM has no length to check",
    "plain.sox": "not audio that libsndfile",
}
# Nothing in these says how long they are.
NO_LENGTH = {
    *("no_xing.mp3", "no_xing_vbr.mp3", "plain.mp2", "plain.aac", "plain.ac3", "plain.ts"),
    *("piped.wav", "piped.au", "piped.mp3", "piped_vbr.mp3", "piped.aac", "piped.webm"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a file of a kind, once."""
    folder = tmp_path_factory.mktemp("kinds")

    def make(name):
        path = folder / name
        if not path.exists():
            options = KINDS[name].split()
            command = ["ffmpeg", "-v", "error", "-i", CLIP, *options]
            if PIPE in options:
                command[-1] = "pipe:1"
                path.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
            else:
                subprocess.run([*command, path], check=True)
        return path

    return make


def ffmpegs(path):
    """ffmpeg's decode, mono at 16 kHz."""
    # ffmpeg's own Opus decoder differs from libopus, the reference, at low bit rates
    decoder = ["-c:a", "libopus"] if path.suffix == ".opus" else []
    command = ["ffmpeg", "-v", "error", *decoder, "-i", path, "-c:a", "pcm_f32le", "-f", "wav", "-"]
    decoded = subprocess.run(command, capture_output=True, check=True).stdout
    wave, rate = soundfile.read(io.BytesIO(decoded), dtype="float32", always_2d=True)
    return soxr.resample(wave.mean(axis=1), rate, SAMPLE_RATE)


def refusal(audio, name=""):
    with pytest.raises(UserError) as caught:
        read_audio(audio, name)
    message = str(caught.value)
    assert message.startswith(name or str(audio))
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", KINDS)
def test_kinds_are_ffmpegs_decode(made, name):
    path = made(name)
    if name in REFUSED:
        assert REFUSED[name] in refusal(path)
        return
    wave, expected = read_audio(path), ffmpegs(path)
    assert audio_samples(path) == len(wave)
    assert abs(len(wave) - len(expected)) <= 320, "more than a frame of the codec"
    both = min(len(wave), len(expected))
    error = np.square(wave[:both] - expected[:both]).mean()
    assert error < 1e-3 * np.square(expected[:both]).mean()
    np.testing.assert_array_equal(read_audio(path.read_bytes(), name), wave)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in REFUSED])
def test_kinds_cut_short(made, tmp_path, name):
    whole = made(name).read_bytes()
    path = tmp_path / name
    path.write_bytes(cut := whole[: int(len(whole) * 0.6) // 2 * 2])
    if name in NO_LENGTH:
        samples = len(read_audio(path))
        assert samples == audio_samples(path) < 0.7 * len(read_audio(whole))
        assert abs(samples - len(ffmpegs(path))) <= 320, "more than a frame of the codec"
    else:
        message = refusal(cut, name)
        assert any(words in message for words in ("truncated", "damaged", "cut short"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("16000.mp3", "abr.mp3"),
        ("no_xing.mp3", "piped.mp3"),
        ("no_id3.mp3", "no_id3.mp3"),
        ("vorbis.ogg", "vorbis.ogg"),
        ("plain.opus", "plain.opus"),
        ("plain.aac", "piped.aac"),
    ],
)
def test_joined_files_are_read_to_the_end(made, tmp_path, first, second):
    joined = tmp_path / f"joined{made(first).suffix}"
    joined.write_bytes(made(first).read_bytes() + made(second).read_bytes())
    wave = read_audio(joined)
    assert audio_samples(joined) == len(wave)
    assert abs(len(wave) - len(ffmpegs(joined))) <= 320


def test_the_padding_of_gsm_is_cut_off(made):
    """The fact chunk counts the samples, and the last block of 320 is padded."""
    gsm = bytearray(made("gsm.wav").read_bytes())
    fact = gsm.index(b"fact") + 8
    samples = int.from_bytes(gsm[fact : fact + 4], "little")
    gsm[fact : fact + 4] = (samples - 100).to_bytes(4, "little")
    assert len(read_audio(bytes(gsm), "a")) == audio_samples(bytes(gsm)) == 2 * (samples - 100)


@pytest.mark.parametrize("coding", ["PCM_16", "ULAW"])
def test_nist_sphere(tmp_path, coding):
    """The format of TIMIT and of LDC's corpora."""
    wave, rate = soundfile.read(CLIP, dtype="float32")
    soundfile.write(tmp_path / "a.sph", wave, rate, format="NIST", subtype=coding)
    np.testing.assert_allclose(read_audio(tmp_path / "a.sph"), wave, atol=0.03)
    whole = (tmp_path / "a.sph").read_bytes()
    assert "more bytes of audio" in refusal(whole[:-100], "a")


def with_total(flac, samples):
    """A FLAC whose STREAMINFO claims another number of samples (36 bits before the MD5)."""
    at = 18
    fields = int.from_bytes(flac[at : at + 8], "big") >> 36 << 36 | samples
    return flac[:at] + fields.to_bytes(8, "big") + flac[at + 8 :]


def with_rate(wav, hertz):
    return wav[:24] + hertz.to_bytes(4, "little") + wav[28:]


def test_headers_that_lie(made, monkeypatch):
    flac, wav = made("plain.flac").read_bytes(), made("s16le.wav").read_bytes()
    assert len(read_audio(with_total(flac, 0))) == audio_samples(with_total(flac, 0)) == 23544
    assert "only 23544 of its 30000 samples" in refusal(with_total(flac, 30_000), "a")
    for read in (read_audio, audio_samples):
        with pytest.raises(UserError, match="a: its header claims 68719476735 samples at 16000 Hz"):
            read(with_total(flac, 2**36 - 1), "a")
        with pytest.raises(UserError, match="a: its header claims 23544 samples at 1 Hz"):
            read(with_rate(wav, 1), "a")
        with pytest.raises(UserError, match="a: its header claims 3999 samples a second"):
            read(with_rate(wav, 3999), "a")
        with pytest.raises(UserError, match="a: not audio"):
            read(with_rate(wav, 0), "a")
    for name in ("plain.flac", "24_bits.flac", "stereo.flac"):
        whole = read_audio(made(name))
        for claimed in (1, 4000, soundfile.info(made(name)).frames - 1):
            less = with_total(made(name).read_bytes(), claimed)
            assert audio_samples(less) == len(whole)
            np.testing.assert_allclose(read_audio(less), whole, atol=1e-6)
    with monkeypatch.context() as without_ffmpeg:
        without_ffmpeg.setitem(sys.modules, "av", None)
        assert "its header counts fewer samples than" in refusal(with_total(flac, 4000), "a")
    monkeypatch.setattr(audio_module, "MAX_SECONDS", 1.0)
    for name in ("piped.flac", "plain.m4a", "no_xing.mp3", "s16le.wav"):
        for read in (read_audio, audio_samples):
            with pytest.raises(UserError, match=r"longer than|more than 0\.01"):
                read(made(name))


def test_a_flac_bomb_takes_no_memory(tmp_path):
    """61 minutes of zeros in some kilobytes, of a length that the header does not tell."""
    with soundfile.SoundFile(tmp_path / "a.flac", "w", 16000, 1, subtype="PCM_16") as file:
        for _ in range(61):
            file.write(np.zeros(60 * 16000, np.int16))
    bomb = with_total((tmp_path / "a.flac").read_bytes(), 0)
    assert len(bomb) < 1 << 20
    assert "longer than 60 minutes" in refusal(bomb, "bomb")


def test_without_ffmpeg_the_extra_is_named(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install 'llasa-jax[audio]'" in refusal(made("plain.m4a"))
    assert "counts its frames" in refusal(made("no_xing.mp3"))
    assert "not audio" in refusal(b"<html>", "page")
    assert len(read_audio(made("vbr.mp3")))


def test_files_that_point_elsewhere_are_not_followed(made, tmp_path):
    other = made("plain.m4a")
    for text in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{other}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {other}\n",
    ):
        (tmp_path / "a.m4a").write_text(text)
        assert "not audio" in refusal(tmp_path / "a.m4a")


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "fifo.wav")
    for path in (tmp_path / "fifo.wav", "a\0.wav", "x" * 5000, CLIP / "a.wav"):
        assert "no such audio file" in refusal(path)
    latin1 = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.flac")
    shutil.copy(CLIP, latin1)
    assert len(read_audio(latin1)) == audio_samples(latin1) == 23544
    with open(latin1, "wb") as file:
        file.write(b"no audio")
    assert "not audio" in refusal(latin1)


@pytest.mark.parametrize("name", ["plain.flac", "vbr.mp3", "plain.m4a"])
def test_a_failing_disk_is_no_damage(made, monkeypatch, name):
    class Failing(io.FileIO):
        def readinto(self, buffer):
            if self.tell() > 0:
                raise OSError(5, "Input/output error")
            return super().readinto(buffer)

        def read(self, size=-1):
            if self.tell() > 0:
                raise OSError(5, "Input/output error")
            return super().read(size)

    path = made(name)
    monkeypatch.setattr(audio_module, "open", lambda p, _: Failing(p), raising=False)
    for read in (read_audio, audio_samples):
        with pytest.raises(OSError, match="Input/output"):
            read(path)


def test_damage_is_one_sentence(made):
    """Bytes changed at random places, above all in the header: read, or refused, and as planned."""
    random, sentences = np.random.default_rng(0), []
    for name in ("s16le.wav", "plain.aiff", "plain.flac", "vorbis.ogg", "vbr.mp3", "plain.m4a"):
        whole = made(name).read_bytes()
        for trial in range(20):
            damaged = bytearray(whole)
            for _ in range(1 + trial % 5):
                place = random.integers(len(whole) if trial % 2 else 200)
                damaged[place] = random.integers(256)
            try:
                samples = len(read_audio(bytes(damaged), name))
            except UserError as error:
                sentences.append(str(error))
            else:
                assert audio_samples(bytes(damaged), name) == samples
    assert 10 < len(sentences) < 110
    assert not any("\n" in sentence for sentence in sentences)
