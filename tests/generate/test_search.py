"""Best of several and beams, by scripted scorers, over a real model, the whole product path."""

import numpy as np
import pytest
from scripted_voice import ShowingCodec, codes_in, scripted_model

from llasa_jax.errors import UserError
from llasa_jax.generate.decode import Rows
from llasa_jax.generate.sampling import SamplingSettings
from llasa_jax.generate.search import Search
from llasa_jax.generate.settings import SearchSettings, SpeechSettings
from llasa_jax.generate.speaker import Line, Speaker

RIGHT, WRONG, WORDS = 40_000, 50_000, 20
TEXTS = [f"{'word ' * WORDS}{number}" for number in range(8)]
SETTINGS = SpeechSettings(max_seconds=WORDS / 50, loop_seconds=0, tail_seconds=3600)
SAMPLING = SamplingSettings(temperature=1.0, seed=3)


class Recogniser:
    """Each code is a word: the share of those that are wrong."""

    higher_is_better = {"wer": False}

    def __init__(self):
        self.seen = []

    def __call__(self, waves, texts, references):
        self.seen += zip(map(len, waves), texts, references, strict=True)
        return {"wer": np.array([np.mean(codes_in(wave) != RIGHT) for wave in waves])}


@pytest.fixture(scope="module")
def speaker(prompter):
    """Of 100 words 15 come out wrong."""
    base = prompter.vocab.code_base
    model = scripted_model(prompter.vocab, {base + RIGHT: 0.85, base + WRONG: 0.15})
    return Speaker(*model, prompter, ShowingCodec(), rows=8)


@pytest.fixture
def drawn(monkeypatch):
    """How many tokens each call of `advance` draws."""
    counts, advance = [], Rows.advance

    def counting(self, *args, **kwargs):
        counts.append(advance(self, *args, **kwargs))
        return counts[-1]

    monkeypatch.setattr(Rows, "advance", counting)
    return counts


def wrong(speaker, search=None) -> float:
    waves = speaker.speak(TEXTS, SAMPLING, SETTINGS, search)
    assert {len(wave) for wave in waves} == {WORDS * 320}
    return float(np.mean([np.mean(codes_in(wave) != RIGHT) for wave in waves]))


def test_best_of_8_halves_the_errors_and_a_beam_does_better_with_as_many_tokens(speaker, drawn):
    alone = wrong(speaker)
    assert 0.1 < alone < 0.25
    drawn.clear()
    best_of_8 = wrong(speaker, Search(SearchSettings(samples=8), outcome=[Recogniser()]))
    tokens = sum(drawn)
    assert best_of_8 < alone / 2
    drawn.clear()
    process, outcome = Recogniser(), Recogniser()
    search = Search(SearchSettings("beam", samples=8, beams=2, every=5), [outcome], [process])
    assert wrong(speaker, search) < best_of_8 / 2
    assert sum(drawn) == tokens == 8 * WORDS * len(TEXTS)
    # The process scorer hears what is said so far, the outcome scorer all of it.
    assert {size // 320 for size, *_ in process.seen} == {5, 10, 15}
    assert {size // 320 for size, *_ in outcome.seen} == {20}
    assert {text for _, text, _ in outcome.seen} == set(TEXTS)


def test_without_scorers_likelihood_and_a_natural_stop_decide(prompter, speaker):
    assert wrong(speaker, Search(SearchSettings(samples=8))) < wrong(speaker) / 2
    base, end = prompter.vocab.code_base, prompter.vocab.speech_end
    model = scripted_model(prompter.vocab, {base + RIGHT: 0.97, end: 0.03})
    ends = Speaker(*model, prompter, ShowingCodec())
    lines, settings = ["dog"] * 12, SpeechSettings(max_seconds=0.5)
    alone = [speech.stopped for _, speech in ends.say(lines, SAMPLING, settings)]
    search = Search(SearchSettings(samples=16))
    chosen = [speech.stopped for _, speech in ends.say(lines, SAMPLING, settings, search)]
    assert sum(alone) < 12
    assert sum(chosen) == 12


def test_scorers_get_the_voice_and_the_first_one_decides(speaker):
    """A scorer that finds all alike leaves it to the next; the prompt is not in what they hear."""

    class Level:
        higher_is_better = {"level": True}

        def __call__(self, waves, texts, references):
            assert all(reference is voice for reference in references)
            return {"level": np.array([np.nan, *(len(wave) for wave in waves[1:])])}

    voice = np.full(3200, RIGHT / 65_536, np.float32)
    line = Line(TEXTS[0], prompt_audio=voice, prompt_text="word")
    search = Search(SearchSettings(samples=8), outcome=[Level(), Recogniser()])
    ((_, speech),) = speaker.say([line], SAMPLING, SETTINGS, search)
    assert len(speech.wave) == WORDS * 320
    assert np.mean(speech.codes != RIGHT) < 0.15


def test_a_budget_of_time_ends_a_search(speaker, drawn):
    search = Search(SearchSettings(samples=800, rows=8, search_seconds=1e-6))
    speaker.speak(TEXTS[:1], SAMPLING, SETTINGS, search)
    assert sum(drawn) == 8 * WORDS
    drawn.clear()
    search = Search(SearchSettings("beam", samples=8, every=5, search_seconds=1e-6))
    (wave,) = speaker.speak(TEXTS[:1], SAMPLING, SETTINGS, search)
    assert len(wave) == 5 * 320


@pytest.mark.parametrize(
    ("text", "kind", "samples"),
    [("best-of:3", "best-of", 3), ("beam", "beam", 8), ("beam:16", "beam", 16)],
)
def test_searches_in_words(text, kind, samples):
    settings = SearchSettings.parse(text, beams=3)
    assert (settings.kind, settings.samples, settings.beams) == (kind, samples, 3)


def test_searches_without_a_meaning_are_refused():
    with pytest.raises(UserError, match="unknown"):
        SearchSettings.parse("best-of-8")
    with pytest.raises(UserError, match=r"search\.samples"):
        SearchSettings.parse("best-of:0")


def test_a_speaker_speaks_one_request_at_a_time(speaker):
    first = speaker.say(TEXTS, SAMPLING, SETTINGS)
    next(first)
    with pytest.raises(RuntimeError, match="is speaking"):
        speaker.speak(TEXTS[:1], SAMPLING, SETTINGS)
    first.close()
    assert len(speaker.speak(TEXTS[:1], SAMPLING, SETTINGS)) == 1
