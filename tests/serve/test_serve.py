"""The server as OpenAI's own client uses it, against the same lines spoken offline."""

import base64
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import soundfile
from served import LIMITS, SAMPLING, SPEECH, serving

from llasa_jax.errors import UserError
from llasa_jax.generate.sampling import SamplingSettings
from llasa_jax.generate.speaker import Line
from llasa_jax.serve.formats import Parts, whole
from llasa_jax.serve.voices import Unknown, Voices
from llasa_jax.speech.audio import read_audio

pytestmark = pytest.mark.slow
TEXT = "the quick brown fox"
ASKED = {"model": "tiny", "voice": "default", "input": TEXT}


@pytest.fixture(scope="session")
def offline(new_speaker):
    """Speaks lines without the server."""
    speaker = new_speaker()

    def speak(line, seed, streams=False):
        sampling = SamplingSettings(SAMPLING.temperature, seed=seed)
        if streams:
            return list(speaker.stream(line, sampling, SPEECH))
        return speaker.speak([line], sampling, SPEECH)[0]

    speak.record = speaker.record
    return speak


def say(served, seed=7, **options):
    return served.client.audio.speech.create(**ASKED | options, extra_body={"seed": seed})


def streamed(waves, format):
    parts = Parts(format)
    return b"".join([*map(parts.feed, waves), parts.end()])


def test_a_request_is_what_is_said_offline(served, offline):
    wave = offline(TEXT, 7)
    for format in ("wav", "flac", "mp3", "opus"):
        answer = say(served, response_format=format)
        if format != "opus":  # whose stream has a random number
            assert answer.content == whole(wave, format)
        heard = read_audio(answer.content, format)
        assert abs(len(heard) - len(wave)) <= 1152  # a frame of an MP3
    assert answer.response.headers["x-seed"] == "7"
    assert say(served, seed=8, response_format="wav").content != whole(wave, "wav")
    assert say(served, response_format="pcm").content == streamed(offline(TEXT, 7, True), "pcm")


def test_speakers_and_instructions_reach_the_prompt(served, offline):
    said = say(served, voice="ada", response_format="wav").content
    assert said == whole(offline(Line(TEXT, speaker="ada"), 7), "wav")
    assert said != whole(offline(TEXT, 7), "wav")
    with pytest.raises(openai.BadRequestError, match="description"):
        say(served, instructions="whisper")


@pytest.mark.parametrize("format", ["wav", "mp3", "flac", "opus", "pcm"])
def test_streams_are_those_of_a_speaker(served, offline, format):
    expected = offline(TEXT, 7, True)
    asked = ASKED | {"response_format": format, "stream_format": "audio"}
    answer = served.client.audio.speech.with_streaming_response.create(
        **asked, extra_body={"seed": 7}
    )
    with answer as response:
        parts = list(response.iter_bytes())
    if format != "opus":
        assert b"".join(parts) == streamed(expected, format)
    if format != "pcm":
        heard = read_audio(b"".join(parts), "speech")
        assert abs(len(heard) - sum(map(len, expected))) <= 2 * 1152


def test_events_carry_the_same_audio(served, offline):
    body = ASKED | {"response_format": "pcm", "stream_format": "sse", "seed": 7}
    key = {"authorization": "Bearer secret"}
    answer = httpx.post(f"{served.url}/v1/audio/speech", json=body, headers=key, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line]
    assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}
    audio = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    assert audio == streamed(offline(TEXT, 7, True), "pcm")
    assert events[-1]["type"] == "speech.audio.done"
    assert events[-1]["usage"]["output_tokens"] == 30
    assert events[-1]["usage"]["input_tokens"] > 10


def test_many_at_once_are_as_if_alone_and_clients_may_vanish(served, offline):
    """Eight requests over three rows, whole and streamed, and four that hang up."""
    texts = ["dog", TEXT, "nothing else that she said was ever true"]

    def ask(number):
        streams = number % 2 == 0
        options = {"stream_format": "audio"} if streams else {}
        said = say(
            served, seed=number, input=texts[number % 3], response_format="wav", **options
        ).content
        wave = offline_waves[number]
        return said == (streamed(wave, "wav") if streams else whole(wave, "wav"))

    def vanish(number):
        key = {"authorization": "Bearer secret"}
        body = ASKED | {"response_format": "pcm", "seed": number}
        url = f"{served.url}/v1/audio/speech"
        with httpx.stream("POST", url, json=body, headers=key, timeout=60) as response:
            if number % 2:
                next(response.iter_raw())

    offline_waves = [offline(texts[n % 3], n, n % 2 == 0) for n in range(8)]
    with ThreadPoolExecutor(12) as pool:
        gone = [pool.submit(vanish, number) for number in range(4)]
        assert all(pool.map(ask, range(8)))
        for one in gone:
            one.result()
    idle(served)


def idle(served):
    """Waits until nothing is spoken or waits."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        counts = httpx.get(f"{served.url}/metrics").text
        if "llasa_running 0.0" in counts and "llasa_waiting 0.0" in counts:
            return
        time.sleep(0.05)
    raise AssertionError("requests are left")


def test_a_voice_is_uploaded_cloned_and_forgotten(served, offline):
    file = io.BytesIO()
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    soundfile.write(file, noise, 16_000, format="WAV")
    url, key = f"{served.url}/v1/audio/voices", {"authorization": "Bearer secret"}

    def upload(name, audio):
        sent = {"audio_sample": ("../../etc/passwd", audio)}
        form = {"name": name, "ref_text": "a dog"}
        return httpx.post(url, data=form, files=sent, headers=key)

    assert upload("me", file.getvalue()).status_code == 200
    voice = offline.record(file.getvalue(), "it")
    line = Line(TEXT, prompt_audio=voice, prompt_text="a dog")
    for streams in (False, True):
        options = {"stream_format": "audio"} if streams else {}
        said = say(served, voice="me", response_format="wav", **options).content
        wave = offline(line, 7, streams)
        assert said == (streamed(wave, "wav") if streams else whole(wave, "wav"))
    for name, audio, sentence in [
        ("me", file.getvalue(), "there already"),
        ("../x", file.getvalue(), "no name of a voice"),
        ("other", b"nothing", "the recording of other"),
        ("other", file.getvalue(), "as many as may be"),
    ]:
        answer = upload(name, audio)
        assert answer.status_code == 400
        assert sentence in answer.json()["error"]["message"]
    assert httpx.get(url, headers=key).json()["uploaded"] == ["me"]
    assert httpx.delete(f"{url}/me", headers=key).status_code == 200
    with pytest.raises(openai.NotFoundError):
        say(served, voice="me")


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"voice": "/etc/passwd"}, openai.NotFoundError, "the voices are default, ada"),
        ({"model": "tts-1"}, openai.NotFoundError, "the models are tiny"),
        ({"input": "x" * 201}, openai.BadRequestError, "201 characters, more than 200"),
        ({"input": "  "}, openai.BadRequestError, "has no text"),
        ({"speed": 2.0}, openai.BadRequestError, "speed"),
        ({"response_format": "aac"}, openai.BadRequestError, "response_format"),
        ({"input": "x" * 300_000}, openai.APIStatusError, "more than 200,000"),
    ],
)
def test_refusals_are_sentences(served, options, kind, sentence):
    with pytest.raises(kind, match=sentence) as caught:
        say(served, **options)
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_broken_requests_are_refused(served):
    url, key = f"{served.url}/v1/audio/speech", {"authorization": "Bearer secret"}
    for content, status in [
        (b"{", 400),
        (b"[]", 400),
        (b'{"input": "\\ud800", "model": "tiny", "voice": "default"}', 400),
        (json.dumps(ASKED | {"prompt_audio": "/etc/passwd"}).encode(), 400),
        (iter([b"{}"]), 411),
    ]:
        answer = httpx.post(url, content=content, headers=key)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    assert httpx.post(url, json=ASKED).status_code == 401
    assert httpx.get(f"{served.url}/v1/models").status_code == 401
    assert httpx.get(f"{served.url}/v2").json()["error"]["type"] == "not_found_error"


def test_models_health_and_metrics(served):
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").object == "model"
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    say(served)
    counts = httpx.get(f"{served.url}/metrics").text
    assert 'llasa_requests_total{path="/v1/audio/speech",status="200"}' in counts


def test_the_queue_and_the_time_are_limited(new_speaker):
    """A codec that takes its time holds no row; a model that does, does."""
    speaker = new_speaker()
    go, started = threading.Event(), threading.Event()
    made = speaker.rows_for

    def slow_rows(*arguments):
        rows = made(*arguments)
        advance = rows.advance

        def slow(*counts):
            started.set()
            go.wait(60)
            return advance(*counts)

        rows.advance = slow
        return rows

    speaker.rows_for = slow_rows
    with serving(speaker, LIMITS, "", max_queue=0, max_seconds=0.5) as served:
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(say, served) for _ in range(3)]
            assert started.wait(60)
            time.sleep(0.6)
            with pytest.raises(openai.RateLimitError, match="waiting"):
                say(served)
            go.set()
            for one in waiting:
                with pytest.raises(openai.InternalServerError, match="longer"):
                    one.result()
        speaker.rows_for = made
        idle(served)


def test_names_of_models_and_voices():
    voices = Voices("base", {"soft": 1, "loud": 2}, ["ada"])
    assert voices.models == ["base", "soft", "loud"]
    assert voices.line("base", "ada") == Line("", speaker="ada")
    assert voices.line("loud", "ada") == Line("", speaker="ada", adapter=2)
    assert voices.line("base", "soft") == Line("", adapter=1)
    with pytest.raises(Unknown):
        voices.line("base", "bob")
    with pytest.raises(UserError, match="same name"):
        Voices("base", {"ada": 1}, ["ada"])
