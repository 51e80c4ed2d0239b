"""The spoken world of speak.py, preference.py and text_chat.py: sentences, flite's recordings of
them, a small Llasa, the product's commands, and who listens.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from llasa_jax.convert.extend_vocab import sums_over_digits
from llasa_jax.demo import CODEC
from llasa_jax.demo.tiny_llama import make_tiny_llama, make_tiny_tokenizer
from llasa_jax.speech.audio import SAMPLE_RATE, read_audio
from llasa_jax.speech.vocab import NUM_CODES, SpeechVocab

VOICES = "slt", "rms", "awb"
NEW_VOICE = "kal16"
SECONDS = 3.06  # of a sentence, about
NEW_SECONDS = 2.5  # of one in the new voice
SMALL = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = [
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen"),
]
TENS = ["twenty", "thirty", "forty", "fifty"]
WORLD = {
    "digit": ["zero", *SMALL],
    "hour": [*SMALL, *TEENS[:3]],
    "minute": [*TEENS, *TENS, *(f"{ten} {one}" for ten in TENS for one in SMALL)],
    "name": ["anna", "david", "emma", "george", "helen", "jack", "laura", "martin", "peter"],
    "day": ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"],
    "month": [
        *("january", "february", "march", "april", "may", "june", "july", "august"),
        *("september", "october", "november", "december"),
    ],
    "ordinal": [
        *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth"),
        *("tenth", "eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth"),
        *("seventeenth", "eighteenth", "nineteenth", "twentieth"),
    ],
    "room": ["kitchen", "bedroom", "bathroom", "garden", "office"],
    "device": ["lamp", "heater", "radio", "window", "door"],
    "action": ["open", "close", "start", "stop", "turn on", "turn off"],
}
SENTENCES = (
    "it is <hour> <minute>",
    "meet <name> on <day> the <ordinal> of <month> at <hour>",
    "<action> the <device> in the <room> at <hour> <minute>",
    "call <name> on <digit> <digit> <digit> <digit> <digit>",
)
# The chat of a Llama without its headers and its system turn, which a model that begins with random
# weights would have to learn to look past.
CHAT_TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}{{- message['content'] | trim -}}"
    "{%- if message['role'] == 'assistant' -%}<|eot_id|>{%- endif -%}{%- endfor -%}"
)
PROMPT = "--prompt.user={text}", "--prompt.assistant_with_speaker={speaker}{codes}"
# What is also learned from, and not asked for: parts of sentences, where which word comes next is
# known from the text alone.
PHRASES = (
    *(f"<{name}>" for name in WORLD),
    *("<digit> <digit>", "<digit> <digit> <digit>", "call <name>", "meet <name>"),
    *("<name> on <day>", "the <ordinal> of <month>", "<month> at <hour>", "it is <hour>"),
    *("<hour> <minute>", "at <hour> <minute>", "<action> the <device>", "in the <room> at <hour>"),
)


def grammar(sentences: tuple[str, ...] = SENTENCES) -> str:
    """The world in JSGF."""
    rules = [f"<{name}> = {' | '.join(words)};" for name, words in WORLD.items()]
    public = f"public <sentence> = {' | '.join(sentences)};"
    return "\n".join(["#JSGF V1.0;", "grammar world;", *rules, public])


def draw(
    count: int,
    seed: int,
    without: frozenset[str] = frozenset(),
    patterns: tuple[str, ...] = SENTENCES,
) -> list[str]:
    """`count` different texts of the world, none of them in `without`."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        pattern = patterns[rng.integers(len(patterns))]
        text = re.sub(
            "<(.*?)>", lambda slot: WORLD[slot[1]][rng.integers(len(WORLD[slot[1]]))], pattern
        )
        if text not in without:
            found[text] = None
    return list(found)


def record(
    folder: Path, texts: list[str], prefix: str, voices: tuple[str, ...] = VOICES
) -> list[dict]:
    """Flite says each text by one voice after the other, as FOLDER/ID.wav, where it is not yet."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = [
        {
            "id": f"{prefix}{number:06d}",
            "text": text,
            "speaker": voices[number % len(voices)],
        }
        for number, text in enumerate(texts)
    ]

    def say(clip: dict) -> None:
        file, new = folder / f"{clip['id']}.wav", folder / f"{clip['id']}.new"
        if not file.exists():
            command = ["flite", "-voice", clip["speaker"], "-t", clip["text"], "-o", str(new)]
            subprocess.run(command, check=True)
            new.replace(file)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(say, clips))
    return clips


def run(*arguments) -> None:
    words = [str(argument) for argument in arguments]
    print("$ llasa-jax", *words, flush=True)
    subprocess.run([sys.executable, "-m", "llasa_jax.cli", *words], check=True)


def structured_codes(folder: Path, seed: int) -> None:
    """Gives the codes of an HF checkpoint random embeddings that know how a code is made: each is
    the sum of eight vectors, one for each of its digits of base 4 (XCodec2's FSQ levels). Codes
    that sound alike begin alike, so that one that is rare in a few hours is not learned alone. They
    are large, or else some dozens of Adam's steps would undo it.
    """
    from safetensors.torch import load_file, save_file

    name, file = "model.embed_tokens.weight", folder / "model.safetensors"
    tensors = load_file(file)
    base = SpeechVocab.of(AutoTokenizer.from_pretrained(folder)).code_base
    width = tensors[name].shape[1]
    vectors = np.random.default_rng(seed).normal(0, 0.12 / np.sqrt(8), (8, 4, width))
    rows = sums_over_digits(vectors).astype(np.float32)
    tensors[name][base : base + NUM_CODES] = torch.from_numpy(rows)
    save_file(tensors, file, {"format": "pt"})


def make_llama(folder: Path, texts: list[str], seed: int, width: int, layers: int) -> None:
    """A small Llasa with random weights, and a tokenizer of the words of `texts`."""
    if (folder / "structured").exists():
        return
    tokenizer = make_tiny_tokenizer([*texts, *VOICES, NEW_VOICE])
    tokenizer.chat_template = CHAT_TEMPLATE
    make_tiny_llama(
        folder,
        tokenizer,
        seed=seed,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        head_dim=32,
        # Of a Llama, but for so narrow a model and so short texts.
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    structured_codes(folder, seed)
    (folder / "structured").touch()


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def say(
    out: Path, name: str, model: Path, asked: list[dict], *more, temperature: float = 0.3
) -> None:
    """`model` says the sentences, into OUT/NAME."""
    lines = [{key: clip[key] for key in ("id", "text", "speaker")} for clip in asked]
    run(
        *("generate", "--model", model, "--codec", CODEC, "--dtype", "float32"),
        *("--temperature", temperature, "--lines", write_lines(out / f"{name}.jsonl", lines)),
        *("--out", out / name, "--rows", "8", *more),
    )


def learn(
    out: Path,
    name: str,
    model: Path,
    sources: list[dict],
    steps: int,
    *more,
    prompt: tuple[str, ...] = PROMPT,
) -> None:
    run(
        "train",
        f"--out={out / name}",
        f"--model.path={model}",
        "--model.remat=none",
        f"--data.sources={json.dumps(sources)}",
        "--data.max_length=1024",
        f"--train.steps={steps}",
        f"--train.save_every={max(1, steps // 10)}",
        "--train.keep=1",
        *prompt,
        *more,
    )


def encoded(
    out: Path, name: str, texts: list[str], voices: tuple[str, ...], validation: float = 0.0
) -> dict:
    """Recordings of `texts` as a dataset, for `data.sources`. The codec in JAX is the faster one
    where there are many clips.
    """
    manifest = out / f"{name}.jsonl"
    if not manifest.exists():
        clips = record(out / name, texts, name, voices)
        write_lines(manifest, [clip | {"audio": f"{name}/{clip['id']}.wav"} for clip in clips])
    records = out / f"{name}_records"
    run(
        *("encode", "--manifest", manifest, "--out", records, "--codec", CODEC),
        *("--device", "jax", "--validation-share", validation),
    )
    return {"path": str(records)} | ({"validation_split": "validation"} if validation else {})


def heard(listener, waves: list[np.ndarray]) -> list[str]:
    found = []
    silence = np.zeros(SAMPLE_RATE // 5)  # PocketSphinx misses words at the very ends
    for wave in waves:
        wave = np.clip(np.concatenate([silence, wave, silence]), -1, 1)
        listener.start_utt()
        listener.process_raw((wave * 32767).astype("<i2").tobytes(), full_utt=True)
        listener.end_utt()
        hypothesis = listener.hyp()
        found.append(re.sub(r"\(\d+\)", "", hypothesis.hypstr) if hypothesis else "")
    return found


def waves_of(folder: Path, asked: list[dict]) -> dict[str, np.ndarray]:
    files = {clip["id"]: folder / f"{clip['id']}.wav" for clip in asked}
    return {id: read_audio(file) for id, file in files.items() if file.exists()}


class Listeners:
    """PocketSphinx with the world's grammar and open, and Resemblyzer with ten clips of each voice
    of the manifests OUT/`known`.
    """

    def __init__(
        self,
        out: Path,
        known: tuple[str, ...] = ("train.jsonl", "new.jsonl"),
        sentences: tuple[str, ...] = SENTENCES,
    ):
        from pocketsphinx import Decoder
        from resemblyzer import VoiceEncoder

        self.recognisers = [Decoder(samprate=SAMPLE_RATE, loglevel="FATAL") for _ in range(2)]
        self.recognisers[0].add_jsgf_string("world", grammar(sentences))
        self.recognisers[0].activate_search("world")
        self._encoder = VoiceEncoder("cpu", verbose=False)
        voices: dict[str, list] = {}
        for file in known:
            for clip in read_lines(out / file):
                of_voice = voices.setdefault(clip["speaker"], [])
                if len(of_voice) < 10:
                    of_voice.append(self._voice(read_audio(out / clip["audio"])))
        self._centres = {name: np.mean(clips, 0) for name, clips in voices.items()}

    def _voice(self, wave: np.ndarray) -> np.ndarray:
        from resemblyzer import preprocess_wav

        wave = preprocess_wav(np.clip(wave, -1, 1), SAMPLE_RATE)
        return self._encoder.embed_utterance(wave) if len(wave) else np.zeros(256)

    def speaker(self, wave: np.ndarray) -> str:
        voice = self._voice(wave)
        return max(self._centres, key=lambda name: self._centres[name] @ voice)

    def line(self, name: str, asked: list[dict], waves: dict[str, np.ndarray]) -> str:
        import jiwer

        spoken = [waves.get(clip["id"], np.zeros(SAMPLE_RATE)) for clip in asked]
        said = [clip["text"] for clip in asked]
        wrong = [jiwer.wer(said, heard(listener, spoken)) for listener in self.recognisers]
        right = np.mean(
            [
                clip["speaker"] == self.speaker(wave)
                for clip, wave in zip(asked, spoken, strict=True)
            ]
        )
        return f"{name:30}{wrong[0]:22.1%}{wrong[1]:10.1%}{right:14.1%}"


def minutes(run: Path) -> float:
    """What training took, starts and compilation included."""
    times = [row for row in read_lines(run / "metrics.jsonl") if "goodput" in row][-1]
    return sum(value for name, value in times.items() if name.startswith("seconds_")) / 60
