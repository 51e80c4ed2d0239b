"""Speaking and scoring a list of texts with every checkpoint, resumably.

The folder of an evaluation holds `evaluation.json`, what is measured; `rows.jsonl`, a line for each
clip that is scored; `clips/CHECKPOINT/NUMBER.flac`; and at the end `results.json` and `index.html`.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llasa_jax.codec import Codec
from llasa_jax.errors import UserError
from llasa_jax.evaluate.references import References
from llasa_jax.evaluate.results import CEILING, summarise
from llasa_jax.evaluate.results_page import write_page
from llasa_jax.evaluate.scorers import Scores, Scoring
from llasa_jax.evaluate.texts import Item
from llasa_jax.runtime.files import read_json
from llasa_jax.runtime.writing import new_file, read_rows, take_lock, write_whole
from llasa_jax.speech.audio import read_audio, write_audio

SETTINGS, ROWS, RESULTS, PAGE = "evaluation.json", "rows.jsonl", "results.json", "index.html"
BATCH = 16  # clips that are scored at once
NAMES = ("model", "texts", "codec", "fingerprints")  # of the settings; may differ, or are apart
WAITING = 2  # batches that wait for each process of scorers before the model is made to wait


class Spoken(NamedTuple):
    """Which item it is, what was said of it, float32 (samples,) at 16 kHz, and whether the model
    stopped by itself (None of what no model spoke).
    """

    item: int
    wave: np.ndarray
    stopped: bool | None


# Speaks items, in any order.
Voice = Callable[[Sequence[Item]], Iterable[Spoken]]


@dataclass
class Evaluation:
    """An evaluation in the folder `out`.

    `items` are spoken by each of `voices`, which maps a checkpoint's name to what loads it;
    `scoring` measures them, `codec` gives the recordings' resynthesis, where there are any, and
    `settings` is all that decides the numbers: an evaluation of other settings is not gone on with.
    """

    out: Path
    items: Sequence[Item]
    voices: Mapping[str, Callable[[], Voice]]
    scoring: Scoring
    codec: Codec | None
    settings: dict
    say: Callable[[str], object] = print

    def __post_init__(self):
        self._references = References(self.items, self.codec)

    def run(self) -> dict:
        """Speaks and scores what is missing, writes `results.json` and `index.html`, and returns
        the results. UserError where the folder holds another evaluation.
        """
        with self._claimed():
            rows = self._read_rows()
            recorded = [at for at, item in enumerate(self.items) if item.recording is not None]
            if recorded and self.codec:
                self._measure(CEILING, recorded, lambda: self._resynthesise, rows)
            for checkpoint, load in self.voices.items():
                self._measure(checkpoint, range(len(self.items)), load, rows)
            known = self.scoring.higher_is_better
            results = summarise(list(rows.values()), list(self.voices), known, self.settings)
            write_whole(self.out / RESULTS, json.dumps(results, indent=1, allow_nan=False))
            write_page(self.out / PAGE, results, list(rows.values()), self.items, self.out)
        return results

    def _measure(
        self,
        checkpoint: str,
        wanted: Sequence[int],
        load: Callable[[], Voice],
        rows: dict[tuple[str, str], dict],
    ) -> None:
        """Speaks the items `wanted` that have no row yet, and adds their rows."""
        missing = [at for at in wanted if (checkpoint, self.items[at].id) not in rows]
        self.say(f"{checkpoint}: {len(missing)} of {len(wanted)} texts to speak")
        if not missing:
            return
        voice = load()
        waiting: list[tuple[list[Spoken], Future[Scores]]] = []
        with (self.out / ROWS).open("ab", buffering=0) as file:
            for batch in _batches(voice([self.items[at] for at in missing]), BATCH):
                spoken = [each._replace(item=missing[each.item]) for each in batch]
                waiting.append((spoken, self._begin(checkpoint, spoken)))
                while len(waiting) > WAITING * self.scoring.processes:
                    self._finish(checkpoint, *waiting.pop(0), rows, file)
            while waiting:
                self._finish(checkpoint, *waiting.pop(0), rows, file)

    def _begin(self, checkpoint: str, spoken: Sequence[Spoken]) -> Future[Scores]:
        """Writes clips, and begins to score them."""
        for each in spoken:
            if len(each.wave):
                clip = self.out / _clip(checkpoint, each.item)
                clip.parent.mkdir(parents=True, exist_ok=True)
                with new_file(clip) as partial:
                    write_audio(partial, each.wave)
        return self.scoring.submit(
            [each.wave for each in spoken],
            [self.items[each.item].text for each in spoken],
            [self._references.of(each.item, checkpoint != CEILING) for each in spoken],
        )

    def _finish(
        self, checkpoint: str, spoken: Sequence[Spoken], scores: Future[Scores], rows: dict, file
    ) -> None:
        found = scores.result()
        for at, each in enumerate(spoken):
            name = self.items[each.item].id
            row = {"checkpoint": checkpoint, "id": name, "item": each.item}
            row |= found.of(at)
            row |= {
                "stopped": None if each.stopped is None else float(each.stopped),
                "transcript": found.transcripts[at],
            }
            row["clip"] = _clip(checkpoint, each.item) if len(each.wave) else None
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            rows[checkpoint, name] = row

    def _resynthesise(self, items: Sequence[Item]) -> Iterator[Spoken]:
        """The codec's resynthesis of the recordings: what speaks in codes cannot sound better."""
        assert self.codec is not None
        for at, item in enumerate(items):
            recording = item.recording
            assert recording is not None
            if isinstance(recording, Path):
                (recording,) = self.codec.encode([read_audio(recording)])
            yield Spoken(at, self.codec.decode(recording), None)

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """Makes the folder, or makes sure that this evaluation lies there, and holds it."""
        self.out.mkdir(parents=True, exist_ok=True)
        path, now = self.out / SETTINGS, json.loads(json.dumps(self.settings))
        with (self.out / ".lock").open("w") as lock:
            if take_lock(lock) is False:
                raise UserError(
                    f"another process evaluates into {self.out}; wait for its end, or choose"
                    " another --out"
                )
            if path.is_file():
                before = read_json(path, "the evaluation's settings")
                self._check_same(before, now)
                now["fingerprints"] = before.get("fingerprints", {}) | now["fingerprints"]
            elif any(entry.name != ".lock" for entry in self.out.iterdir()):
                raise UserError(
                    f"{self.out} already holds something that is no evaluation; choose another"
                    " --out"
                )
            write_whole(path, json.dumps(now, indent=1))
            yield

    def _check_same(self, before: dict, now: dict) -> None:
        """UserError where other numbers would come than those that are there. Names and paths may
        change: fingerprints say what they name.
        """
        old = {name: before.get(name) for name in now if name not in NAMES} | {
            f"fingerprint of {name}": value
            for name, value in before.get("fingerprints", {}).items()
        }
        new = {name: value for name, value in now.items() if name not in NAMES} | {
            f"fingerprint of {name}": value for name, value in now["fingerprints"].items()
        }
        for name in old.keys() & new.keys():
            if old[name] != new[name]:
                raise UserError(
                    f"{self.out} holds an evaluation with another {name} ({old[name]}, not"
                    f" {new[name]}); choose another --out"
                )

    def _read_rows(self) -> dict[tuple[str, str], dict]:
        """The rows that are there, by checkpoint and text."""
        fix = "delete the line, and its clip is spoken again"
        found = read_rows(self.out / ROWS, "the evaluation's rows", fix=fix, limit=2**30)
        return {(row["checkpoint"], row["id"]): row for row in found}


def _batches(spoken: Iterable[Spoken], size: int) -> Iterator[list[Spoken]]:
    batch: list[Spoken] = []
    for each in spoken:
        batch.append(each)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _clip(checkpoint: str, item: int) -> str:
    return os.path.join("clips", checkpoint, f"{item:05}.flac")
