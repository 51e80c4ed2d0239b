"""`llasa-jax prefer`: several speeches of each text, scored and ranked, become pairs to train on.

The samples are kept in OUT.samples, a line for each text, and the pairs written to OUT once all
texts are done.
"""

import dataclasses
import json
import math
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from llasa_jax.align.journal import SampleJournal, opened, packed, unpacked
from llasa_jax.codec import DEFAULT_CODEC
from llasa_jax.data.builder import write_dataset
from llasa_jax.data.seal import check_unfinished, identity, is_made
from llasa_jax.encode.offline import codec_metadata
from llasa_jax.errors import UserError
from llasa_jax.evaluate.checkpoints import line_of, mentioned_by, texts_fingerprint
from llasa_jax.evaluate.references import References
from llasa_jax.evaluate.scorers import DEFAULT_SCORERS, Scores, Scoring
from llasa_jax.evaluate.texts import Item, items_to_speak
from llasa_jax.generate.continuous import run_continuous
from llasa_jax.generate.files import identity as model_identity
from llasa_jax.generate.line import Line
from llasa_jax.generate.sampling import SamplingSettings
from llasa_jax.generate.settings import SpeechSettings
from llasa_jax.generate.speaker import Said, Speaker
from llasa_jax.speech.prompts import join_texts

WAITING = 4  # texts whose samples wait for each process of scorers before the model waits
# Published work on Llasa draws from this, which leaves out the tail that a temperature above 1
# raises.
SAMPLING = SamplingSettings(temperature=1.1, top_k=75, top_p=0.9)
# Texts are spoken in one piece and the speech is kept as it comes: it is what is trained on.
SPEECH = SpeechSettings(piece_seconds=600.0, tail_seconds=3600.0)


def prefer(
    model: str | Path,
    texts: str,
    out: Path,
    *,
    samples: int = 8,
    pairs: int = 1,
    gap: float = 0.0,
    scorers: Sequence[str] = DEFAULT_SCORERS,
    scorer_device: str = "cpu",
    scorer_processes: int = 1,
    language: str = "",
    speaker: str = "",
    most: int = 0,
    codec: str | Path = DEFAULT_CODEC,
    device: str = "cpu",
    sampling: SamplingSettings = SAMPLING,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    rows: int = 8,
    tensor: int = 1,
    step: int | None = None,
    base: str | Path | None = None,
) -> dict:
    """Draws `samples` speeches of each of `texts` (see `read_items`; the first `most` of them),
    ranks them by the scorers, and writes a dataset of pairs (see `write_dataset`) to `out`: of each
    text the best and the worst, and up to `pairs` in all, the second best and second worst next.

    The scorers' numbers decide in their order, the next where the one before finds no difference.
    A text whose speeches differ in none gives no pairs, nor do two whose first number differs by
    less than `gap`. Returns how many texts, samples and pairs there are. The same call goes on
    where it was ended. Raises UserError for bad input, and where no text has a pair.
    """
    if sampling.temperature == 0:
        raise UserError("at temperature 0 all samples are the same; give one above 0, such as 1.1")
    items, language = items_to_speak(texts, most, speaker, language)
    drawn = {
        "model": model_identity(model, step),
        "texts": texts_fingerprint(items),
        "samples": samples,
        "scorers": list(scorers),
        "language": language,
        "sampling": dataclasses.asdict(sampling),
        "dtype": dtype,
    }
    made_from = identity("prefer", json.dumps(drawn), pairs, gap)
    if (summary := is_made(out, made_from)) is not None:
        return summary
    check_unfinished(out)
    with opened(out.with_name(f"{out.name}.samples"), drawn) as journal:
        missing = [at for at, item in enumerate(items) if item.id not in journal.rows]
        print(f"{len(items) - len(missing):,} of {len(items):,} texts are done already")
        if missing:
            voice = Speaker.load(
                model,
                codec=codec,
                dtype=dtype,
                step=step,
                base=base,
                device=device,
                tensor=tensor,
                rows=rows,
            )
            with Scoring(scorers, scorer_device, language, scorer_processes) as scoring:
                _sample(voice, scoring, items, missing, samples, sampling, bool(speaker), journal)
        rows_of = [journal.rows[item.id] for item in items]
        made = [
            record
            for item, row in zip(items, rows_of, strict=True)
            for record in records_of(item, row, pairs, gap)
        ]
    if not made:
        raise UserError(
            f"the samples of no text of {texts} differ in any score, so there are no pairs; draw"
            " more samples, at a higher temperature, or give other scorers"
        )
    with_pairs = len({record["line"] for record in made})
    summary = {"texts": len(items), "texts_with_pairs": with_pairs, "pairs": len(made)}
    records = ({k: v for k, v in record.items() if k != "line"} for record in made)
    write_dataset(
        out,
        {"train": records},
        rows_of[0]["codec"],
        made_from,
        lambda: summary,
        pairs=True,
    )
    return summary


def _sample(
    voice: Speaker,
    scoring: Scoring,
    items: Sequence[Item],
    missing: Sequence[int],
    samples: int,
    sampling: SamplingSettings,
    named: bool,
    journal: SampleJournal,
) -> None:
    """Speaks and scores the items `missing`, several at once, and keeps a row of each."""
    names = mentioned_by(voice.prompter) | ({"speaker"} if named else set())
    lines = {at: line_of(items[at], names) for at in missing}
    for line in lines.values():  # before anything is said, in case a text is refused
        voice.check(line)
    references = References(items, voice.codec)
    about = codec_metadata(voice.codec)
    waiting: deque[tuple[int, list[Said], Future[Future[Scores]]]] = deque()

    def finish() -> None:
        at, said, scores = waiting.popleft()
        row = _row(items[at], said, scores.result().result(), scoring.higher_is_better)
        journal.add(row | {"codec": about})
        print(f"{len(journal.rows):,} of {len(items):,} texts", flush=True)

    def begin(at: int, said: Sequence[Said]) -> Future[Scores]:
        waves = [voice.sound(one, SPEECH).wave for one in said]
        count = len(waves)
        return scoring.submit(waves, [items[at].text] * count, [references.of(at)] * count)

    def first_is_done() -> bool:
        begun = waiting[0][2]
        return begun.done() and begun.result().done()

    with ThreadPoolExecutor(1) as pool:
        for at, said in draw(voice, lines, samples, sampling):
            waiting.append((at, said, pool.submit(begin, at, said)))
            while len(waiting) > WAITING * scoring.processes or (waiting and first_is_done()):
                finish()
        while waiting:
            finish()


def draw(
    voice: Speaker,
    lines: dict[int, Line],
    samples: int,
    sampling: SamplingSettings,
    speech: SpeechSettings = SPEECH,
) -> Iterator[tuple[int, list[Said]]]:
    """(key, its samples) of `lines` by key, as they end. A sample depends on its line's id and its
    own number alone, not on what is drawn beside it.
    """
    seeds = [zlib.crc32(f"{sampling.seed} {n}".encode()) & 0x7FFFFFFF for n in range(samples)]
    jobs = (
        ((key, number), voice.job(key, line, speech, seed))
        for key, line in lines.items()
        for number, seed in enumerate(seeds)
    )
    found: dict[int, dict[int, Said]] = {}
    for (key, number), said in run_continuous(voice.rows_for(sampling, speech, voice.rows), jobs):
        found.setdefault(key, {})[number] = said
        if len(found[key]) == samples:
            of_line = found.pop(key)
            yield key, [of_line[number] for number in range(samples)]


def _row(item: Item, said: Sequence[Said], scores: Scores, higher: dict[str, bool]) -> dict:
    """What is kept of a text: its samples with their scores."""
    return {
        "id": item.id,
        "prompt": packed(said[0].prompt),
        "higher_is_better": higher,
        "samples": [
            {
                "codes": packed(np.concatenate(one.pieces)),
                "stopped": one.stopped,
                "logprob": one.logprob,
                "transcript": scores.transcripts[at],
                "scores": scores.of(at),
            }
            for at, one in enumerate(said)
        ],
    }


def rank(samples: Iterable[dict], higher: dict[str, bool]) -> list[tuple[tuple, dict]]:
    """Samples that say something, best first, each with what decides: the scores in the order of
    `higher`, larger is better, and whether the model stopped by itself.
    """

    def key(sample: dict) -> tuple:
        scores = [sample["scores"].get(name) for name in higher]
        signed = [
            -math.inf if score is None else score if rises else -score
            for score, rises in zip(scores, higher.values(), strict=True)
        ]
        return *signed, bool(sample["stopped"])

    ranked = [(key(sample), sample) for sample in samples if sample["codes"]]
    return sorted(ranked, key=lambda each: (each[0], each[1]["logprob"]), reverse=True)


def records_of(item: Item, row: dict, pairs: int, gap: float) -> list[dict]:
    """The pairs of a text, as `write_dataset` takes them; the `line` is the text's id."""
    ranked, prompt = rank(row["samples"], row["higher_is_better"]), unpacked(row["prompt"])
    records = []
    for number in range(min(pairs, len(ranked) // 2)):
        (good, better), (bad, worse) = ranked[number], ranked[-1 - number]
        # `not >=`: the difference of two numbers that are both missing is none either.
        if good == bad or (gap and not good[0] - bad[0] >= gap):
            break
        kept = {
            name: {key: sample[key] for key in ("scores", "logprob", "transcript")}
            for name, sample in (("better", better), ("worse", worse))
        }
        records.append(
            {
                "line": item.id,
                "id": f"{item.id}#{number}" if number else item.id,
                "text": join_texts(item.prompt_text, item.text),
                "speaker": item.speaker,
                "description": item.description,
                "language": item.language,
                "codes": np.concatenate([prompt, unpacked(better["codes"])]),
                "worse": np.concatenate([prompt, unpacked(worse["codes"])]),
                "prompt": len(prompt),
                "stopped": np.array([better["stopped"], worse["stopped"]]),
                "scores": json.dumps(kept, ensure_ascii=False),
            }
        )
    return records
