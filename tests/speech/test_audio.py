"""Every file that is not speech is refused in one sentence; every file that is becomes 16 kHz mono
float32.
"""

import shutil
import subprocess

import numpy as np
import pytest
import soundfile

from llasa_jax.errors import UserError
from llasa_jax.speech.audio import SILENCE_PEAK, audio_samples, read_audio, write_audio


def tone(rate=16000, seconds=0.5, hertz=440.0, peak=0.5):
    return (peak * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(
        np.float32
    )


def refused(path, words):
    with pytest.raises(UserError) as caught:
        read_audio(path)
    message = str(caught.value)
    assert str(path) in message
    assert words in message
    assert message.endswith(".")
    assert "\n" not in message


def dominant_hertz(wave):
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return spectrum.argmax() * 16000 / len(wave)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_any_rate_becomes_16_khz(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(rate), rate)
    wave = read_audio(tmp_path / "a.wav")
    assert wave.dtype == np.float32
    assert wave.shape == (8000,)
    assert abs(dominant_hertz(wave) - 440) < 3
    assert abs(np.abs(wave[2000:6000]).max() - 0.5) < 0.01


def test_16_khz_samples_are_untouched(tmp_path):
    wave = tone()
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav"), wave)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.opus"])
@pytest.mark.parametrize("rate", [8000, 16000, 24000, 22050, 44100, 48000])
def test_headers_tell_lengths(tmp_path, name, rate):
    """Online training plans with them, so they must be exact to the sample."""
    form = {"format": "OGG", "subtype": "OPUS"} if name.endswith("opus") else {}
    if form and rate not in (8000, 16000, 24000, 48000):
        pytest.skip("no rate of Opus's")
    for samples in (rate // 3 + 1, rate // 3 + 7, rate + 123):
        soundfile.write(tmp_path / name, tone(rate, 2)[:samples], rate, **form)
        assert audio_samples(tmp_path / name) == len(read_audio(tmp_path / name))


def test_stereo_is_the_mean_of_its_channels(tmp_path):
    left, right = tone(hertz=300), tone(hertz=500)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [
        ("a.wav", "PCM_16", 1e-4),
        ("a.wav", "PCM_24", 1e-6),
        ("a.wav", "FLOAT", 0),
        ("a.wav", "DOUBLE", 0),
        ("a.flac", "PCM_16", 1e-4),
        ("a.ogg", "VORBIS", 0.05),
        ("a.mp3", "MPEG_LAYER_III", 0.05),
    ],
)
def test_formats(tmp_path, name, subtype, tolerance):
    soundfile.write(tmp_path / name, tone(), 16000, subtype=subtype)
    wave = read_audio(tmp_path / name)
    np.testing.assert_allclose(wave[1000:7000], tone()[1000:7000], atol=tolerance)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_wav_from_a_pipe_has_no_length_in_its_header(tmp_path):
    spoken = subprocess.run(
        ["espeak-ng", "--stdout", "hello"], capture_output=True, check=True
    ).stdout
    (tmp_path / "a.wav").write_bytes(spoken)
    assert len(read_audio(tmp_path / "a.wav")) > 4000


def test_chunks_before_the_samples(tmp_path):
    soundfile.write(tmp_path / "plain.wav", tone(), 16000, subtype="PCM_16")
    plain = (tmp_path / "plain.wav").read_bytes()
    start = plain.index(b"data")
    listed = plain[:start] + b"LIST\x03\0\0\0abc\0" + plain[start:]
    (tmp_path / "a.wav").write_bytes(listed)
    np.testing.assert_array_equal(
        read_audio(tmp_path / "a.wav"), read_audio(tmp_path / "plain.wav")
    )
    (tmp_path / "cut.wav").write_bytes(listed[:-2])
    refused(tmp_path / "cut.wav", "truncated")


def test_missing_empty_and_no_audio(tmp_path):
    refused(tmp_path / "none.wav", "no such audio file")
    refused(tmp_path, "no such audio file")
    for name in ("a.wav", "a.raw", "a.flac"):
        (tmp_path / name).write_bytes(b"")
        refused(tmp_path / name, "0 bytes")
        (tmp_path / name).write_bytes(b"<html>not found</html>" * 50)
        refused(tmp_path / name, "not audio")


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated(tmp_path, name, share):
    noise = np.random.default_rng(0).normal(0, 0.1, 32000)
    soundfile.write(tmp_path / name, noise, 16000, subtype="PCM_16")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    refused(tmp_path / name, "truncated")


def test_no_samples(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 16000)
    refused(tmp_path / "a.wav", "no samples")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(tmp_path, value):
    wave = tone()
    wave[100] = value
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    refused(tmp_path / "a.wav", "NaN or infinite")
    with pytest.raises(UserError, match="NaN or infinite"):
        write_audio(tmp_path / "b.wav", wave)
    assert not (tmp_path / "b.wav").exists()


def test_silence(tmp_path):
    for peak in (0, SILENCE_PEAK / 2):
        soundfile.write(tmp_path / "a.wav", tone(peak=peak), 16000, subtype="FLOAT")
        refused(tmp_path / "a.wav", "silent")
    soundfile.write(tmp_path / "a.wav", tone(peak=SILENCE_PEAK * 2), 16000, subtype="FLOAT")
    assert len(read_audio(tmp_path / "a.wav"))


def test_opposite_channels_cancel_to_silence(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([tone(), -tone()], 1), 16000, subtype="FLOAT")
    refused(tmp_path / "a.wav", "silent")


@pytest.mark.parametrize("name", ["a.wav", "new/folder/a.flac"])
def test_written_audio_reads_back(tmp_path, name):
    wave = tone()
    wave[:2] = [1.5, -1.5]
    write_audio(tmp_path / name, wave)
    np.testing.assert_allclose(read_audio(tmp_path / name), np.clip(wave, -1, 1), atol=1e-4)


def test_a_full_disk_is_told_as_that(tmp_path):
    (tmp_path / "a.wav").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_audio(tmp_path / "a.wav", tone())


def test_write_needs_a_known_suffix(tmp_path):
    with pytest.raises(UserError, match="a.xyz.*cannot be written"):
        write_audio(tmp_path / "a.xyz", tone())
