"""From nothing to speech: a Llasa from random weights learns flite's voices, then says sentences
that were in no training data: `python benchmarks/speak.py`.

The world is closed: times, appointments, orders and digits, over a million possible sentences, all
drawn from one seed. All is done by the product's own commands: encode with the demo's codec,
import-hf, train, generate. PocketSphinx, with the world's grammar and open, says which words are
understood, in flite's recordings, in what the codec makes of them, and in the model's speech;
Resemblyzer says whose voice it is. Then the model learns a voice that it never had from three
minutes of it, all weights and LoRA. Give `--hours 0.02 --steps 20 --sentences 8` to try it.

The tables are also written to `speak.txt` in `--out`, and with `--results FOLDER` there, with five
of the sentences spoken. The same command goes on where it was stopped. It takes hours on two cores.
`--gpu` trains on a GPU: more speech, a larger model and ten times the tokens, in minutes. Needs
flite (Debian's package), and the extra `evaluate` with Resemblyzer.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from llasa_jax.codec import load_codec
from llasa_jax.convert.extend_vocab import sums_over_digits
from llasa_jax.demo import CODEC
from llasa_jax.demo.tiny_llama import make_tiny_llama, make_tiny_tokenizer
from llasa_jax.speech.audio import SAMPLE_RATE, read_audio
from llasa_jax.speech.vocab import NUM_CODES, SpeechVocab

VOICES = "slt", "rms", "awb"
NEW_VOICE = "kal16"
SECONDS = 2.5  # of a sentence, about
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


def grammar() -> str:
    """The world in JSGF."""
    rules = [f"<{name}> = {' | '.join(words)};" for name, words in WORLD.items()]
    public = f"public <sentence> = {' | '.join(SENTENCES)};"
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


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def say(out: Path, name: str, model: Path, asked: list[dict], *more) -> None:
    """`model` says the sentences, into OUT/NAME."""
    lines = [{key: clip[key] for key in ("id", "text", "speaker")} for clip in asked]
    run(
        *("generate", "--model", model, "--codec", CODEC, "--dtype", "float32"),
        *("--temperature", "0.3", "--lines", write_lines(out / f"{name}.jsonl", lines)),
        *("--out", out / name, "--rows", "8", *more),
    )


def learn(out: Path, name: str, model: Path, sources: list[dict], steps: int, *more) -> None:
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
        *PROMPT,
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


def from_nothing(
    out: Path, texts: list[str], phrases: list[str], asked: list[dict], options
) -> None:
    sentences = encoded(out, "train", texts, VOICES, validation=0.01)
    parts = encoded(out, "phrases", [one for one in phrases for _ in VOICES], VOICES)
    sources = [sentences | {"weight": len(texts)}, parts | {"weight": len(phrases) * len(VOICES)}]
    if not (out / "hf" / "structured").exists():
        tokenizer = make_tiny_tokenizer([*texts, *VOICES, NEW_VOICE])
        tokenizer.chat_template = CHAT_TEMPLATE
        make_tiny_llama(
            out / "hf",
            tokenizer,
            seed=options.seed,
            hidden_size=options.width,
            intermediate_size=4 * options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=options.width // 32,
            num_key_value_heads=options.width // 32,
            head_dim=32,
            # Of a Llama, but for so narrow a model and so short texts.
            initializer_range=0.05,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        )
        structured_codes(out / "hf", options.seed)
        (out / "hf" / "structured").touch()
    run("import-hf", out / "hf", out / "model")
    learn(
        *(out, "run", out / "model", sources, options.steps),
        *(f"--optimizer.learning_rate={options.learning_rate}", f"--train.rows={options.rows}"),
        *("--optimizer.weight_decay=0.1", "--train.validate_every=100"),
        f"--model.dtype={options.dtype}",
    )
    say(out, "spoken", out / "run", asked)


def new_voice(out: Path, texts: list[str], asked: list[dict], options) -> None:
    """The trained model learns `NEW_VOICE` from a few minutes."""
    records = [encoded(out, "new", texts, (NEW_VOICE,))]
    rest = "--train.rows=2", f"--model.dtype={options.dtype}"
    run("export-hf", out / "run", out / "release")
    say(out, "new_before", out / "run", asked)
    learn(
        *(out, "new_full", out / "release", records, options.new_steps),
        *("--optimizer.learning_rate=3e-4", *rest),
    )
    say(out, "new_after", out / "new_full", asked)
    learn(
        *(out, "new_lora", out / "release", records, options.new_steps),
        *("--optimizer.learning_rate=2e-3", "--lora.rank=32", *rest),
    )
    say(out, "new_after_lora", out / "new_lora", asked)


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
    """PocketSphinx with the world's grammar and open, and Resemblyzer with ten clips of each
    voice.
    """

    def __init__(self, out: Path):
        from pocketsphinx import Decoder
        from resemblyzer import VoiceEncoder

        self.recognisers = [Decoder(samprate=SAMPLE_RATE, loglevel="FATAL") for _ in range(2)]
        self.recognisers[0].add_jsgf_string("world", grammar())
        self.recognisers[0].activate_search("world")
        self._encoder = VoiceEncoder("cpu", verbose=False)
        known: dict[str, list] = {name: [] for name in (*VOICES, NEW_VOICE)}
        for file in ("train.jsonl", "new.jsonl"):
            for clip in map(json.loads, (out / file).read_text().splitlines()):
                if len(known[clip["speaker"]]) < 10:
                    known[clip["speaker"]].append(self._voice(read_audio(out / clip["audio"])))
        self._centres = {name: np.mean(voices, 0) for name, voices in known.items()}

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


def measure(out: Path, asked: list[dict], new: list[dict]) -> list[str]:
    """The lines of the tables."""
    listeners, codec = Listeners(out), load_codec(CODEC)
    title = f"{'':30}{'words wrong (grammar)':>22}{'(open)':>10}{'right voice':>14}"
    table = [f"{len(asked)} sentences in no training data", title]
    flite = waves_of(out / "flite", asked)
    again = {id: codec.decode(codec.encode([wave])[0]) for id, wave in flite.items()}
    ours = waves_of(out / "spoken", asked)
    for name, waves in (("flite", flite), ("through the codec", again), ("the model", ours)):
        table.append(listeners.line(name, asked, waves))
    lines = [json.loads(line) for line in (out / "spoken/lines.jsonl").read_text().splitlines()]
    stopped = sum(line["stopped"] for line in lines) / len(asked)
    pace = sum(map(len, ours.values())) / sum(len(flite[id]) for id in ours)
    table.append(f"{stopped:.1%} stop by themselves; {pace:.2f} times flite's length")
    table += ["", f"{NEW_VOICE}, a voice of which the model had nothing", title]
    for name, folder in (
        ("flite", "flite_new"),
        ("the model, before", "new_before"),
        ("finetuned, all weights", "new_after"),
        ("finetuned, LoRA", "new_after_lora"),
    ):
        table.append(listeners.line(name, new, waves_of(out / folder, new)))
    return table


def minutes(run: Path) -> float:
    """What training took, starts and compilation included."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    times = [row for row in rows if "goodput" in row][-1]
    return sum(value for name, value in times.items() if name.startswith("seconds_")) / 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(".cache/speak"))
    parser.add_argument("--results", type=Path, help="keep the tables and five wavs here too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpu", action="store_true", help="with other defaults for what follows")
    gpu = "--gpu" in sys.argv
    parser.add_argument("--hours", type=float, default=16.7 if gpu else 2.5)
    parser.add_argument(
        "--phrases", type=int, default=1200, help="parts of sentences, in all voices"
    )
    parser.add_argument("--steps", type=int, default=2000 if gpu else 1200)
    parser.add_argument("--rows", type=int, default=16 if gpu else 2)
    parser.add_argument("--sentences", type=int, default=200, help="unseen ones, to be said")
    parser.add_argument("--new-minutes", type=float, default=3.0, help="of the new voice")
    parser.add_argument("--new-steps", type=int, default=150)
    parser.add_argument("--width", type=int, default=192 if gpu else 128)
    parser.add_argument("--layers", type=int, default=8 if gpu else 6)
    parser.add_argument("--learning-rate", type=float, default=2e-3 if gpu else 1.5e-3)
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if options.gpu else "cpu")
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    world = [options.seed, options.hours, options.phrases, options.sentences]
    place = out / "world.json"
    if place.exists() and json.loads(place.read_text()) != world:
        raise SystemExit(f"{out} holds other sentences; give another --out, or the same options")
    place.write_text(json.dumps(world))
    unseen = draw(options.sentences, options.seed + 1)
    texts = draw(int(options.hours * 3600 / SECONDS), options.seed, frozenset(unseen))
    phrases = draw(options.phrases, options.seed, patterns=PHRASES)
    asked = record(out / "flite", unseen, "u")
    few = texts[: max(1, int(options.new_minutes * 60 / SECONDS))]
    new = record(out / "flite_new", unseen[: max(1, len(unseen) // 4)], "n", (NEW_VOICE,))
    from_nothing(out, texts, phrases, asked, options)
    new_voice(out, few, new, options)
    table = measure(out, asked, new)
    table.append(
        f"seed {options.seed}, {options.hours} hours of sentences and {options.phrases} phrases in"
        f" each voice, {options.steps} steps of"
        f" {options.rows} rows of 1024 tokens, width {options.width}, {options.layers} layers;"
        f" {options.new_minutes} minutes and {options.new_steps} steps for the new voice"
    )
    table.append(
        f"training took {minutes(out / 'run'):.0f} minutes, the new voice"
        f" {minutes(out / 'new_full'):.0f} and {minutes(out / 'new_lora'):.0f} (LoRA); this piece"
        f" of the program {(time.time() - began) / 60:.0f}"
    )
    print("\n".join(table))
    (out / "speak.txt").write_text("\n".join(table) + "\n")
    if options.results:
        (options.results / "speak").mkdir(parents=True, exist_ok=True)
        (options.results / "speak.txt").write_text("\n".join(table) + "\n")
        for clip in asked[:5]:
            name = clip["text"].replace(" ", "_") + f"_{clip['speaker']}.wav"
            shutil.copy(out / "spoken" / f"{clip['id']}.wav", options.results / "speak" / name)


if __name__ == "__main__":
    main()
