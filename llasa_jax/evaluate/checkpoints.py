"""`llasa-jax evaluate`: a model or a run's checkpoints, spoken, scored and compared."""

import dataclasses
import hashlib
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from llasa_jax.codec import DEFAULT_CODEC, Codec, load_codec
from llasa_jax.convert.model_folder import open_model, saved_steps
from llasa_jax.errors import UserError
from llasa_jax.evaluate.evaluation import Evaluation, Spoken, Voice
from llasa_jax.evaluate.scorers import DEFAULT_SCORERS, Scoring
from llasa_jax.evaluate.texts import Item, items_to_speak
from llasa_jax.generate.sampling import SamplingSettings
from llasa_jax.generate.speaker import Line, Speaker, check_codec, load
from llasa_jax.runtime.files import folder_digest
from llasa_jax.runtime.storage import as_path
from llasa_jax.speech.prompts import Prompter
from llasa_jax.speech.settings import fields_of


def evaluate(
    model: str | Path,
    texts: str,
    out: Path,
    *,
    steps: str = "",
    scorers: Sequence[str] = DEFAULT_SCORERS,
    scorer_device: str = "cpu",
    scorer_processes: int = 1,
    language: str = "",
    speaker: str = "",
    most: int = 0,
    codec: str | Path = DEFAULT_CODEC,
    device: str = "cpu",
    sampling: SamplingSettings | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    rows: int = 8,
    base: str | Path | None = None,
) -> dict:
    """Speaks `texts` (see `read_items`; the first `most` of them) with a model's folder or hub id,
    or with a run's checkpoints, scores what it says, and writes all that into the folder `out`.

    `steps` is "" for the latest checkpoint, "all", or a list such as "100,200". `language` is that
    of the texts, by default their records', where that is one. `speaker` speaks the texts that name
    none. Returns the results (see `results.summarise`). The same call goes on where it was ended.
    Raises UserError for bad input.
    """
    items, language = items_to_speak(texts, most, speaker, language)
    sampling = sampling or SamplingSettings()
    chosen = chosen_steps(model, steps)
    opened = open_model(model)
    sound = load_codec(codec, device)
    check_codec(as_path(model), sound)
    settings = {
        "model": str(model),
        "texts": texts,
        "codec": str(codec),
        "language": language,
        "scorers": list(scorers),
        "sampling": dataclasses.asdict(sampling),
        "dtype": dtype,
        "fingerprints": {
            "texts": texts_fingerprint(items),
            "codec": sound.fingerprint,
            **{name: opened.fingerprint(step) for name, step in chosen.items()},
        },
    }
    load_voice = partial(
        _voice,
        model,
        codec=sound,
        dtype=dtype,
        base=base,
        rows=rows,
        sampling=sampling,
        names={"speaker"} if speaker else set(),  # named on purpose: refused if not mentioned
    )
    voices = {name: partial(load_voice, step) for name, step in chosen.items()}
    with Scoring(scorers, scorer_device, language, scorer_processes) as scoring:
        return Evaluation(out, items, voices, scoring, sound, settings).run()


def chosen_steps(model: str | Path, steps: str) -> dict[str, int | None]:
    """Checkpoints by name: those of a run that `steps` names; "model" for a model's folder."""
    saved = saved_steps(as_path(model))
    if not saved:
        if steps:
            raise UserError(f"{model} is no run with checkpoints; leave --steps out")
        return {"model": None}
    if steps == "all":
        return {str(step): step for step in saved}
    wanted = [saved[-1]]
    if steps:
        parts = [part.strip() for part in steps.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise UserError(f"--steps is {steps}; give all, or steps such as 100,200")
        wanted = sorted({int(part) for part in parts})
    if missing := [step for step in wanted if step not in saved]:
        raise UserError(
            f"{model} has no checkpoint of step {missing[0]}; it has {', '.join(map(str, saved))}"
        )
    return {str(step): step for step in wanted}


def texts_fingerprint(items: Sequence[Item]) -> str:
    """16 hex digits that tell a list of items from others."""
    found = hashlib.sha256()
    for item in items:
        for field in dataclasses.fields(item):
            value = getattr(item, field.name)
            if isinstance(value, Path):
                value = folder_digest(value)
            elif hasattr(value, "tobytes"):
                value = value.tobytes()
            found.update(f"{value!r}\n".encode(errors="surrogateescape"))
    return found.hexdigest()[:16]


def mentioned_by(prompter: Prompter) -> set[str]:
    """What of speaker, description and language the prompts of a model mention. They refuse what
    would change nothing, which records may have all the same.
    """
    prompt = prompter.settings
    templates = prompt.system + prompt.user + prompt.assistant + prompt.assistant_with_speaker
    return set(fields_of(templates)) & {"speaker", "description", "language"}


def line_of(item: Item, names: Collection[str]) -> Line:
    """An item as the `Speaker` takes it, with the fields `names` of it. Its id seeds the random
    numbers, so that an evaluation that was ended and goes on says the same.
    """
    return Line(
        item.text,
        prompt_audio=item.prompt_audio,
        prompt_text=item.prompt_text,
        id=item.id,
        **{name: getattr(item, name) for name in names},
    )


def _voice(
    model: str | Path,
    step: int | None,
    *,
    codec: Codec,
    dtype: Literal["bfloat16", "float32"],
    base: str | Path | None,
    rows: int,
    sampling: SamplingSettings,
    names: set[str],
) -> Voice:
    graphdef, params, prompter, _ = load(as_path(model), dtype, step, base=base)
    speaker = Speaker(graphdef, params, prompter, codec, rows=rows)
    return partial(spoken_by, speaker, sampling, mentioned_by(prompter) | names)


def spoken_by(
    speaker: Speaker, sampling: SamplingSettings, names: Collection[str], items: Sequence[Item]
) -> Iterator[Spoken]:
    """What a `Speaker` says of items, whose fields `names` the prompt has."""
    for at, speech in speaker.say((line_of(item, names) for item in items), sampling):
        yield Spoken(at, speech.wave, speech.stopped)
