"""An evaluation of scripted voices: recordings that every later checkpoint spoils less."""

import json
import os
import re
import signal
import warnings
from concurrent.futures import Future

import numpy as np
import pytest
from scipy import stats

from llasa_jax.data.builder import write_dataset
from llasa_jax.errors import UserError
from llasa_jax.evaluate.evaluation import Evaluation, Spoken
from llasa_jax.evaluate.known import DOOR, KEYS, recording
from llasa_jax.evaluate.levels import Levels
from llasa_jax.evaluate.scorers import load_scorers, score
from llasa_jax.evaluate.statistics import difference_of, mean_of
from llasa_jax.evaluate.texts import Item, read_items

CLIPS = {"rms_1": DOOR, "rms_2": KEYS, "slt_2": KEYS}


class Here:
    """`Scoring` in this process."""

    processes = 1

    def __init__(self, *scorers):
        self._scorers = scorers
        self.higher_is_better = {k: v for each in scorers for k, v in each.higher_is_better.items()}

    def submit(self, *clips):
        future = Future()
        future.set_result(score(self._scorers, *clips))
        return future


class Loudness:
    """The level of a clip, as a scorer."""

    higher_is_better = {"level": True}

    def __call__(self, waves, texts, references):
        levels = [np.sqrt(np.mean(w**2)) if len(w) else np.nan for w in waves]
        return {"level": np.array(levels, np.float64)}


class Echo:
    """A codec whose codes are a wave's samples, for resynthesis that can be checked."""

    fingerprint = "echo"

    def encode(self, waves):
        return [np.round(wave[::320] * 1000).astype(np.int32) for wave in waves]

    def decode(self, codes):
        return np.repeat(np.asarray(codes) / 1000, 320).astype(np.float32)


def items_of(count=6, **fields):
    return [Item(f"clip{at}", f"text number {at}", **fields) for at in range(count)]


def voice(level, spoken=None, silent=()):
    """Speaks tones, louder by the item, and notes what it was asked for."""

    def speak(items):
        for at, item in enumerate(items):
            if spoken is not None:
                spoken.append(item.id)
            number = int(item.id.removeprefix("clip"))
            wave = np.sin(np.arange(8000) / 5) * level * (1 + number / 10)
            wave = wave[: 0 if number in silent else None]
            yield Spoken(at, wave.astype(np.float32), number % 2 == 0)

    return lambda: speak


def evaluation(out, voices, items=None, settings=None, **others):
    known = {"model": "runs/tiny", "texts": "texts.txt", "seed": 0, "fingerprints": {"texts": "a"}}
    others = {"scoring": Here(Loudness(), Levels()), "codec": None, "say": str} | others
    return Evaluation(out, items or items_of(), voices, settings=settings or known, **others)


def test_results(tmp_path):
    voices = {"10": voice(0.1), "20": voice(0.3, silent=[5])}
    results = evaluation(tmp_path / "out", voices).run()
    assert json.loads((tmp_path / "out/results.json").read_text()) == results
    first, second = results["checkpoints"]
    assert (first["checkpoint"], second["checkpoint"]) == ("10", "20")
    level = 0.1 * np.sqrt(0.5) * np.array([1, 1.1, 1.2, 1.3, 1.4, 1.5])
    numbers = first["numbers"]["level"]
    assert numbers["mean"] == pytest.approx(level.mean(), rel=1e-2)
    assert level.min() < numbers["low"] < numbers["mean"] < numbers["high"] < level.max()
    assert (numbers["clips"], second["numbers"]["level"]["clips"]) == (6, 5)
    assert first["numbers"]["stopped"]["mean"] == 0.5
    compared = [each for each in results["comparisons"] if each["number"] == "level"]
    assert [(each["from"], each["to"], each["clips"]) for each in compared] == [("10", "20", 5)]
    assert compared[0]["mean"] == pytest.approx(2 * level[:5].mean(), rel=1e-2)
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert [row["id"] for row in rows if row["clip"] is None] == ["clip5"]
    assert len(list((tmp_path / "out/clips").rglob("*.flac"))) == 11


def test_it_goes_on_where_it_was_ended(tmp_path):
    out, spoken = tmp_path / "out", []

    def failing(items):
        yield from list(voice(0.1, spoken)()(items))[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation(out, {"10": lambda: failing}).run()
    whole = evaluation(tmp_path / "whole", {"10": voice(0.1)}).run()
    # As a killed process leaves them: some rows, and a line that ends in its midst.
    lines = (tmp_path / "whole/rows.jsonl").read_text().splitlines(keepends=True)
    (out / "rows.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    spoken.clear()
    assert evaluation(out, {"10": voice(0.1, spoken)}).run() == whole
    assert spoken == ["clip3", "clip4", "clip5"]
    spoken.clear()
    assert evaluation(out, {"10": voice(0.1, spoken)}).run() == whole
    assert spoken == []
    # Another checkpoint later joins those that are there.
    both = evaluation(out, {"10": voice(0.1, spoken), "20": voice(0.2, spoken)}).run()
    assert len(spoken) == 6
    assert both["checkpoints"][0] == whole["checkpoints"][0]


def evaluate_until_killed(out, at: int) -> int:
    """The signal that ended a process that is killed (kill -9) when it has `at` texts spoken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX has threads, which the child does not use
        child = os.fork()
    if child == 0:

        def dying(items):
            for number, spoken in enumerate(voice(0.1)()(items)):
                if number == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield spoken

        evaluation(out, {"10": lambda: dying}, items_of(40)).run()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_again_and_again(tmp_path):
    """Each text is spoken once, and the results are those of a run that was never killed."""
    out = tmp_path / "out"
    for at in (0, 5, 18, 17, 20):  # sixteen clips are scored at a time
        assert evaluate_until_killed(out, at) == -signal.SIGKILL
    assert evaluate_until_killed(out, 99) == 0
    whole = evaluation(tmp_path / "whole", {"10": voice(0.1)}, items_of(40)).run()
    one, other = ((path / "rows.jsonl").read_text() for path in (out, tmp_path / "whole"))
    assert sorted(one.splitlines()) == sorted(other.splitlines())
    assert json.loads((out / "results.json").read_text()) == whole
    assert evaluate_until_killed(out, 0) == 0  # done: nothing is spoken


def test_another_evaluation_is_refused(tmp_path):
    voices, out = {"10": voice(0.1)}, tmp_path / "out"
    evaluation(out, voices).run()
    known = {"model": "moved/tiny", "texts": "copy.txt", "seed": 0, "fingerprints": {"texts": "a"}}
    evaluation(out, voices, settings=known).run()
    for changed, said in (
        (known | {"seed": 1}, r"another seed \(0, not 1\)"),
        (known | {"fingerprints": {"texts": "b"}}, r"another fingerprint of texts \(a, not b\)"),
    ):
        with pytest.raises(UserError, match=said):
            evaluation(out, voices, settings=changed).run()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something that is no evaluation"):
        evaluation(tmp_path / "other", voices).run()


def test_the_ceiling_and_the_references(tmp_path):
    class Length:
        higher_is_better = {"similar": True}

        def __call__(self, waves, texts, references):
            found = [np.nan if r is None else len(r) / 320 for r in references]
            return {"similar": np.array(found)}

    codes = [np.full(length, 300) for length in (10, 20, 30, 40)]
    items = [
        Item("clip0", "a", "ada", recording=codes[0]),
        Item("clip1", "b", "ada", recording=codes[1]),
        Item("clip2", "c", "ben", recording=codes[2]),  # his only recording
        Item("clip3", "d", recording=codes[3]),
    ]
    out = tmp_path / "out"
    scoring = Here(Length(), Levels())
    results = evaluation(out, {"10": voice(0.1)}, items, scoring=scoring, codec=Echo()).run()
    rows = {}
    for line in (out / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["checkpoint"], row["id"]] = row
    similar = {key: row["similar"] for key, row in rows.items()}
    assert [similar["10", f"clip{at}"] for at in range(4)] == [20, 10, 30, 40]
    assert [similar["ceiling", f"clip{at}"] for at in range(4)] == [20, 10, None, None]
    assert [each["checkpoint"] for each in results["checkpoints"]] == ["ceiling", "10"]
    assert rows["ceiling", "clip0"]["seconds"] == pytest.approx(10 / 50)
    # Paces of the recordings: 10, 20, 30 and 40 codes a letter. A tone of 25 codes is right.
    assert rows["10", "clip0"]["pace"] == 25
    assert results["checkpoints"][1]["numbers"]["pace_off"]["mean"] == pytest.approx(0, abs=0.01)
    assert "stopped" not in [
        n for n, v in results["checkpoints"][0]["numbers"].items() if v["clips"]
    ]


def test_the_page(tmp_path):
    items = [Item(f"clip{at}", f"</td><script>alert({at})</script>") for at in range(6)]
    voices = {str(step): voice(step / 100, silent=[2]) for step in (10, 20, 30)}
    evaluation(tmp_path / "out", voices, items).run()
    page = (tmp_path / "out/index.html").read_text()
    assert "<script" not in page.replace("&lt;script", "")
    sources = re.findall(r'(?:src|href)="([^"]{0,22})', page)
    assert len(sources) == 5 + 3 * 5  # the worst of the last checkpoint, and all side by side
    assert set(sources) == {"data:audio/mpeg;base64"}
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r'src="[^"]*"', "", page))
    for words in ("Numbers", "Comparisons", "Worst clips", "Side by side", "10 → 30", "no speech"):
        assert words in page
    assert page.count('<polyline class="curve"') >= 2
    # The quietest is worst, after the one that was not spoken.
    worst = page[page.index("Worst clips") :]
    assert re.findall(r"<td>(clip\d)</td>", worst)[:3] == ["clip2", "clip0", "clip1"]


@pytest.mark.slow
def test_checkpoints_are_ordered_as_they_were_trained(tmp_path):
    """Each step says more of the sentences; a real recogniser judges."""
    items = [Item(name, text) for name, text in CLIPS.items()]

    def spoken(share):
        def speak(items):
            for at, item in enumerate(items):
                wave = recording(item.id)
                yield Spoken(at, wave[: int(share * len(wave))], share == 1)

        return lambda: speak

    voices = {step: spoken(share) for step, share in {"1": 0.4, "2": 0.7, "3": 1}.items()}
    scoring = Here(*load_scorers(["pocketsphinx"]))
    results = evaluation(tmp_path / "out", voices, items, scoring=scoring).run()
    rates = [each["numbers"]["wer"]["mean"] for each in results["checkpoints"]]
    # What is missing are words that are not heard, and parts of a word may be heard as another.
    assert 0.4 < rates[0] < 0.8
    assert rates[0] > rates[1] > rates[2] < 0.1
    changes = [e["mean"] for e in results["comparisons"] if e["number"] == "wer"]
    assert all(change < 0 for change in changes)


def test_intervals_cover_and_tests_agree():
    random, hits = np.random.default_rng(1), 0
    for _ in range(100):
        found = mean_of(random.exponential(1, 60))
        hits += found.low <= 1 <= found.high
    assert hits >= 86  # of 95 expected, three standard deviations and the bootstrap's own bias
    before = random.normal(0, 1, 40)
    for shift in (0.1, 0.2):
        after = before + random.normal(shift, 0.5, 40)
        ours = difference_of(before, after)
        assert ours.p == pytest.approx(stats.ttest_rel(after, before).pvalue, abs=0.02)
        assert ours.mean == pytest.approx((after - before).mean())
    assert difference_of(before, before).p == 1
    some = np.array([1.0, np.nan, 2.0])
    assert difference_of(some, some + 1)[::4] == (1.0, 2)
    assert np.isnan(mean_of(np.array([np.nan])).mean)


def test_lists_of_texts(tmp_path):
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "meta.lst").write_text(
        "u1|What a says.|a.wav|To speak.\nu2|What a says.|a.wav|Too.|b.wav\n\nu3|Alone.\n"
    )
    a, b = tmp_path / "a.wav", tmp_path / "b.wav"
    assert read_items(str(tmp_path / "meta.lst")) == [
        Item("u1", "To speak.", prompt_audio=a, prompt_text="What a says."),
        Item("u2", "Too.", prompt_audio=a, prompt_text="What a says.", recording=b),
        Item("u3", "Alone."),
    ]
    (tmp_path / "t.txt").write_text("One.\n\nTwo.\n")
    assert read_items(str(tmp_path / "t.txt")) == [Item("1", "One."), Item("2", "Two.")]
    assert len(read_items(str(tmp_path / "t.txt"), most=1)) == 1
    rows = [{"text": "A.", "speaker": "ada"}, {"id": "x", "text": "B.", "audio": "b.wav"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_items(str(tmp_path / "t.jsonl")) == [
        Item("1", "A.", "ada"),
        Item("x", "B.", recording=b),
    ]
    clip = {"id": "c", "text": "C.", "codes": np.array([3, 4], np.uint16), "speaker": "ben"}
    write_dataset(tmp_path / "data", {"held": [clip | {"description": "", "language": "en"}]}, {})
    (item,) = read_items(f"{tmp_path / 'data'}:held")
    assert (item.id, item.text, item.speaker, item.language) == ("c", "C.", "ben", "en")
    assert list(item.recording) == [3, 4]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.txt", "", "holds no text to speak"),
        ("t.csv", "a", "is no list of texts"),
        ("m.lst", "a|b|c\n", "line 1: has 3 columns"),
        ("m.lst", "a||c.wav|d\n", "line 1: has 4 columns, or an empty one"),
        ("m.lst", "a|b|no.wav|d\n", "there is no .*no.wav"),
        ("m.lst", "a|b\na|c\n", "the id a is given twice"),
        ("t.jsonl", '{"text": "a", "voice": "b"}\n', "the key voice is not known"),
        ("t.jsonl", '{"text": 3}\n', "text is not a text"),
        ("t.jsonl", '{"id": "a"}\n', "has no text to speak"),
        ("t.jsonl", '{"text": "a", "prompt_text": "b"}\n', "prompt_audio and prompt_text go"),
        ("t.jsonl", "text\n", "line 1 is damaged"),
    ],
)
def test_bad_lists_are_refused(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        read_items(str(tmp_path / name))


def test_missing_lists_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such list of texts"):
        read_items(str(tmp_path / "t.txt"))
    with pytest.raises(UserError, match="no dataset"):
        read_items(f"{tmp_path}:validation")
