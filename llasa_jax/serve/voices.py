"""What a request may name as its model and its voice."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Lock

from llasa_jax.data.manifest import numbered_lines
from llasa_jax.errors import UserError, listed, printable
from llasa_jax.generate.line import Line
from llasa_jax.generate.speaker import Speaker
from llasa_jax.runtime.files import parse_json
from llasa_jax.speech.audio import SAMPLE_RATE

DEFAULT = "default"
NAME = r"[\w][\w .-]{0,99}"


class Unknown(Exception):
    """A request names what is not there: `what` it names, and a sentence."""

    def __init__(self, what: str, sentence: str):
        super().__init__(sentence)
        self.what, self.sentence = what, sentence


class Voices:
    """The model's name, its adapters by name (the place of each among the Speaker's), speakers of
    the training data, and voices to clone, which may be added.
    """

    def __init__(self, model: str, adapters: Mapping[str, int], speakers: list[str]):
        self.model, self.adapters, self._lock = model, dict(adapters), Lock()
        self._made: dict[str, Line] = {DEFAULT: Line("")}
        self._made |= {name: Line("", speaker=name) for name in speakers}
        self._made |= {name: Line("", adapter=place) for name, place in adapters.items()}
        self.uploaded: set[str] = set()
        if len(self._made) <= len(adapters) + len(speakers):
            raise UserError(
                "an adapter, a speaker and the default voice have the same name; name each once"
            )

    @property
    def models(self) -> list[str]:
        """The model and its adapters."""
        return [self.model, *self.adapters]

    @property
    def names(self) -> list[str]:
        """All voices."""
        return list(self._made)

    def line(self, model: str, voice: str) -> Line:
        """A line without text that is spoken by `voice`. Raises Unknown."""
        if model not in self.models:
            raise Unknown(
                "model",
                f"the model {printable(model[:100])!r} is not served here; the models are"
                f" {listed(self.models)}",
            )
        line = self._made.get(voice)
        if line is None:
            raise Unknown(
                "voice",
                f"the voice {printable(voice[:100])!r} is not known here; the voices are"
                f" {listed(self.names)}",
            )
        if voice in self.adapters:
            return line
        return replace(line, adapter=self.adapters.get(model, 0))

    def check_name(self, name: str) -> None:
        """UserError where a voice cannot be called `name`."""
        if not re.fullmatch(NAME, name):
            raise UserError(
                f"{printable(name[:100])!r} is no name of a voice; give up to 100 letters, digits,"
                " blanks, dots and dashes"
            )
        if name in self._made:
            raise UserError(f"the voice {name!r} is there already; give another name")

    def add(
        self,
        speaker: Speaker,
        name: str,
        audio: str | Path | bytes,
        text: str,
        max_seconds: float,
        most: int | None = None,
    ) -> None:
        """Adds a voice to clone: a recording, and what it says. Its codes are made once. `most` is
        how many voices may be uploaded, None for one that is not.
        """
        self.check_name(name)
        voice = speaker.record(audio, f"the recording of {name}")
        seconds = len(voice.wave) / SAMPLE_RATE
        if seconds > max_seconds:
            raise UserError(
                f"the recording of {name} takes {seconds:.1f} s, longer than {max_seconds:g} s;"
                " cut it"
            )
        line = Line("", prompt_audio=voice, prompt_text=text)
        with self._lock:
            self.check_name(name)
            if most is not None:
                if len(self.uploaded) >= most:
                    raise UserError(f"{most} voices were uploaded, as many as may be; delete one")
                self.uploaded.add(name)
            self._made[name] = line

    def remove(self, name: str) -> None:
        """Forgets an uploaded voice. Raises Unknown."""
        with self._lock:
            if name not in self.uploaded:
                raise Unknown("voice", f"no voice {printable(name[:100])!r} was uploaded")
            self.uploaded.remove(name)
            del self._made[name]

    def read(self, path: Path, speaker: Speaker, max_seconds: float) -> None:
        """Adds the voices of a JSONL file: objects with name, audio, relative to the file, and
        text, what it says.
        """
        for where, line in numbered_lines(path):
            given = parse_json(line, where, fix="correct the line")
            wrong = {"name", "audio", "text"} ^ given.keys()
            if wrong or not all(isinstance(value, str) for value in given.values()):
                raise UserError(
                    f"{where}: a voice has name, audio and text, all of them texts; correct the"
                    " line"
                )
            try:
                audio = path.parent / given["audio"]
                self.add(speaker, given["name"], audio, given["text"], max_seconds)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
