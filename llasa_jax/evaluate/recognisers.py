"""Recognisers, and how many words of a text they do not hear.

Words are compared after a published normaliser: Whisper's English one for English, Whisper's basic
one for other languages. Languages that are written without spaces are compared by characters, as in
Whisper's paper and in Seed-TTS-eval.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llasa_jax.errors import UserError, first_line
from llasa_jax.evaluate.known import needed
from llasa_jax.evaluate.levels import letters_of
from llasa_jax.speech.audio import SAMPLE_RATE

WITHOUT_SPACES = {"zh", "yue", "ja", "th", "lo", "my"}
# Han, kana, Thai, Lao, Tibetan, Myanmar and Khmer: what is written without spaces.
_SCRIPTS = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
SHORTEST = 400  # samples, 25 ms: less is no speech to a recogniser
WINDOW = 30 * SAMPLE_RATE  # samples that Whisper hears at once
WHISPER, PARAFORMER = "openai/whisper-large-v3", "paraformer-zh"


def language_code(language: str) -> str:
    """The code of a language, such as en for "en-GB" or "English", "" for "".

    UserError where Whisper does not know it.
    """
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    name = language.strip().lower().replace("_", "-")
    code = TO_LANGUAGE_CODE.get(name, name.partition("-")[0])
    if code and code not in LANGUAGES:
        raise UserError(
            f"the language {language!r} is not known; give a code such as en, de or zh, or none"
        )
    return code


class Recogniser:
    """What is heard in speech, and how far that is from the text.

    `hear` turns waves of at least `SHORTEST` samples into texts. `wer` is word errors by words of
    the text (characters in languages without spaces), `cer` character errors by characters; NaN
    where a text has neither. A wave with nothing in it is heard as nothing: all words are missing.
    """

    higher_is_better = {"wer": False, "cer": False}

    def __init__(
        self,
        hear: Callable[[list[np.ndarray]], list[str]],
        language: str = "",
        spelling: dict[str, str] | None = None,
    ):
        from transformers.models.whisper.english_normalizer import (
            BasicTextNormalizer,
            EnglishTextNormalizer,
        )

        self._jiwer = needed("jiwer")
        self._hear, self.language = hear, language_code(language)
        self._letters = BasicTextNormalizer(split_letters=True)
        self._words: Callable[[str], str] = (
            EnglishTextNormalizer(spelling or {})
            if self.language == "en"
            else BasicTextNormalizer()
        )
        self._chinese = needed("zhconv") if self.language in ("zh", "yue") else None

    def __call__(
        self,
        waves: Sequence[np.ndarray],
        texts: Sequence[str],
        references: Sequence[np.ndarray | None] = (),
    ) -> dict[str, np.ndarray]:
        return self.rates(texts, self.transcribe(waves))

    def transcribe(self, waves: Sequence[np.ndarray]) -> list[str]:
        """What is heard in each wave, float32 (samples,) at 16 kHz."""
        spoken = [at for at, wave in enumerate(waves) if len(wave) >= SHORTEST]
        texts = [""] * len(waves)
        if spoken:
            for at, text in zip(spoken, self._hear([waves[at] for at in spoken]), strict=True):
                texts[at] = text.strip()
        return texts

    def rates(self, texts: Sequence[str], heard: Sequence[str]) -> dict[str, np.ndarray]:
        """`wer` and `cer` of texts that were heard as `heard`, float64 (texts,) each."""
        found: dict[str, list[float]] = {"wer": [], "cer": []}
        for text, other in zip(texts, heard, strict=True):
            if not letters_of(text):
                found["wer"].append(float("nan"))
                found["cer"].append(float("nan"))
                continue
            if self._chinese:  # traditional characters count as their simplified ones
                text, other = (self._chinese.convert(each, "zh-cn") for each in (text, other))
            by_letters = self.language in WITHOUT_SPACES or (
                not self.language and _SCRIPTS.search(text)
            )
            units = self._without_blanks if by_letters else self._words
            for name, normal in (("wer", units), ("cer", self._without_blanks)):
                found[name].append(float(self._jiwer.wer(normal(text), normal(other))))
        return {name: np.array(rates, np.float64) for name, rates in found.items()}

    def _without_blanks(self, text: str) -> str:
        """The letters of a text, a blank after each."""
        return " ".join(self._letters(text).split())


def pocketsphinx(language: str = "", grammar: str | Path = "") -> Recogniser:
    """CMU PocketSphinx with the English model in its package: on the CPU, without a download.

    It understands clear English: for flite's voices it errs in 0 to 20% of the words. With the file
    of a JSGF `grammar`, whose words its dictionary must have, it hears the grammar's sentences
    alone, and errs less. UserError for a grammar that it does not take.
    """
    if language_code(language) not in ("", "en"):
        raise UserError(
            f"pocketsphinx knows English only, not {language!r}; use the scorer whisper, or"
            " another recogniser as asr:HUB_ID"
        )
    decoder = needed("pocketsphinx").Decoder(samprate=float(SAMPLE_RATE), loglevel="FATAL")
    if grammar:
        try:
            decoder.add_jsgf_string("grammar", Path(grammar).read_text(encoding="utf-8"))
            decoder.activate_search("grammar")
        except (OSError, UnicodeDecodeError, RuntimeError, ValueError) as error:
            raise UserError(
                f"PocketSphinx does not take the grammar {grammar} ({first_line(error)}); give a"
                " file in JSGF with a public rule, whose words are English ones in small letters"
            ) from error

    def hear(waves: list[np.ndarray]) -> list[str]:
        texts = []
        for wave in waves:
            decoder.start_utt()
            decoder.process_raw(_pcm16(wave), no_search=False, full_utt=True)
            decoder.end_utt()
            found = decoder.hyp()
            # Of two pronunciations the second is written like `to(2)`.
            texts.append(re.sub(r"\(\d+\)", "", found.hypstr) if found else "")
        return texts

    return Recogniser(hear, "en")


def transformers_recogniser(
    name: str = WHISPER, device: str = "cpu", language: str = "", batch: int = 8
) -> Recogniser:
    """Any speech recogniser of transformers, by its hub id or folder: Whisper, wav2vec 2, ...

    Whisper is asked for `language`; without one, it finds the language of each clip.
    """
    from transformers import pipeline

    code = language_code(language)
    try:
        recognise: Any = pipeline("automatic-speech-recognition", model=name, device=device)
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"the recogniser {name} cannot be loaded on {device} ({first_line(error)}); give the"
            " hub id or the folder of a speech recogniser of transformers, and a device that is"
            " there"
        ) from error
    model: Any = recognise.model
    is_whisper = model.config.model_type == "whisper"
    options: dict[str, Any] = {}
    if is_whisper:
        # Greedy as in Seed-TTS-eval; the pipeline's own default is a beam of five.
        options["generate_kwargs"] = {"num_beams": 1}
        if getattr(model.generation_config, "is_multilingual", False):
            asked = {"task": "transcribe"} | ({"language": code} if code else {})
            options["generate_kwargs"] |= asked

    def hear(waves: list[np.ndarray]) -> list[str]:
        inputs = [{"raw": wave, "sampling_rate": SAMPLE_RATE} for wave in waves]
        if is_whisper and max(map(len, waves)) <= WINDOW:
            # Only Whisper pads every clip to one length: others hear more in a clip that is padded.
            found = recognise(inputs, batch_size=batch, **options)
        else:
            # Whisper goes through longer speech window by window, for which it needs timestamps.
            found = [
                recognise(each, return_timestamps=is_whisper or None, **options) for each in inputs
            ]
        return [each["text"] for each in found]

    return Recogniser(hear, code, getattr(recognise.tokenizer, "english_spelling_normalizer", None))


def paraformer(device: str = "cpu", language: str = "") -> Recogniser:
    """Paraformer-large through funasr, the recogniser of Seed-TTS-eval for Chinese."""
    code = language_code(language) or "zh"
    if code not in ("zh", "en"):
        raise UserError(f"paraformer knows Chinese, not {language!r}; use the scorer whisper")
    model = needed("funasr").AutoModel(
        model=PARAFORMER, device=device, disable_update=True, disable_pbar=True
    )

    def hear(waves: list[np.ndarray]) -> list[str]:
        found = model.generate(input=waves, fs=SAMPLE_RATE, batch_size_s=300)
        return [each["text"] for each in found]

    return Recogniser(hear, code)


def _pcm16(wave: np.ndarray) -> bytes:
    return (np.clip(wave, -1, 1) * 32_767).astype("<i2").tobytes()
