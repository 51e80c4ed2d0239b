"""From nothing to speech: a Llasa from random weights learns flite's voices, then says sentences
that were in no training data: `python benchmarks/speak.py`.

The world is closed: times, appointments, orders and digits, over a million possible sentences, all
drawn from one seed. All is done by the product's own commands: encode with the demo's codec,
import-hf, train, generate. PocketSphinx, with the world's grammar and open, says which words are
understood, in flite's recordings, in what the codec makes of them, and in the model's speech;
Resemblyzer says whose voice it is. Give `--hours 0.02 --steps 20 --sentences 8` to try it.

The table is also written to `speak.txt` in `--out`. The same command goes on where it was stopped.
Without `--hours` and the like it takes hours on two
cores. Needs flite (Debian's package), and the extra `evaluate` with Resemblyzer.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from llasa_jax.codec import load_codec
from llasa_jax.demo import CODEC
from llasa_jax.demo.tiny_llama import SAMPLE_TEXT, make_tiny_llama, make_tiny_tokenizer
from llasa_jax.speech.audio import SAMPLE_RATE, read_audio

VOICES = "slt", "rms", "awb"
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


def grammar() -> str:
    """The world in JSGF."""
    rules = [f"<{name}> = {' | '.join(words)};" for name, words in WORLD.items()]
    public = f"public <sentence> = {' | '.join(SENTENCES)};"
    return "\n".join(["#JSGF V1.0;", "grammar world;", *rules, public])


def draw(count: int, seed: int, without: frozenset[str] = frozenset()) -> list[str]:
    """`count` different sentences of the world, none of them in `without`."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        pattern = SENTENCES[rng.integers(len(SENTENCES))]
        text = re.sub(
            "<(.*?)>", lambda slot: WORLD[slot[1]][rng.integers(len(WORLD[slot[1]]))], pattern
        )
        if text not in without:
            found[text] = None
    return list(found)


def record(folder: Path, texts: list[str], prefix: str) -> list[dict]:
    """Flite says each text by one voice after the other, as FOLDER/ID.wav, where it is not yet."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = [
        {
            "id": f"{prefix}{number:06d}",
            "text": text,
            "speaker": VOICES[number % len(VOICES)],
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


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(out: Path, options: argparse.Namespace) -> list[dict]:
    """Records, a trained model and its speech, in `out`. Returns the unseen sentences' clips."""
    world, place = [options.seed, options.hours, options.sentences], out / "world.json"
    if place.exists() and json.loads(place.read_text()) != world:
        raise SystemExit(f"{out} holds other sentences; give another --out, or the same options")
    place.write_text(json.dumps(world))
    unseen = draw(options.sentences, options.seed + 1)
    texts = draw(int(options.hours * 3600 / SECONDS), options.seed, frozenset(unseen))
    if not (out / "train.jsonl").exists():
        clips = [
            clip | {"audio": f"wavs/{clip['id']}.wav"} for clip in record(out / "wavs", texts, "t")
        ]
        write_lines(out / "train.jsonl", clips)
    asked = record(out / "flite", unseen, "u")
    run("encode", "--manifest", out / "train.jsonl", "--out", out / "records", "--codec", CODEC)
    if not (out / "hf" / "tokenizer.json").exists():
        make_tiny_llama(
            out / "hf",
            make_tiny_tokenizer([*SAMPLE_TEXT, *texts]),
            seed=options.seed,
            hidden_size=options.width,
            intermediate_size=3 * options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=options.width // 64,
            num_key_value_heads=options.width // 64,
            head_dim=64,
        )
    run("import-hf", out / "hf", out / "model")
    run(
        "train",
        f"--out={out / 'run'}",
        f"--model.path={out / 'model'}",
        "--model.dtype=float32",
        "--model.remat=none",
        f"--data.path={out / 'records'}",
        "--data.max_length=1024",
        f"--optimizer.learning_rate={options.learning_rate}",
        f"--train.steps={options.steps}",
        "--train.rows=4",
        f"--train.save_every={max(1, options.steps // 10)}",
        "--train.keep=1",
    )
    lines = [{key: clip[key] for key in ("id", "text", "speaker")} for clip in asked]
    run(
        *("generate", "--model", out / "run", "--codec", CODEC, "--dtype", "float32"),
        *("--temperature", "0.5", "--lines", write_lines(out / "lines.jsonl", lines)),
        *("--out", out / "spoken", "--rows", "8"),
    )
    return asked


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


def measure(out: Path, asked: list[dict], options: argparse.Namespace) -> list[str]:
    """The lines of the table."""
    import jiwer
    from pocketsphinx import Decoder
    from resemblyzer import VoiceEncoder, preprocess_wav

    listeners = [Decoder(samprate=SAMPLE_RATE, loglevel="FATAL") for _ in range(2)]
    listeners[0].add_jsgf_string("world", grammar())
    listeners[0].activate_search("world")
    encoder = VoiceEncoder("cpu", verbose=False)

    def voice(wave: np.ndarray) -> np.ndarray:
        return encoder.embed_utterance(preprocess_wav(np.clip(wave, -1, 1), SAMPLE_RATE))

    known = {name: [] for name in VOICES}
    for clip in map(json.loads, (out / "train.jsonl").read_text().splitlines()):
        if len(known[clip["speaker"]]) < 10:
            known[clip["speaker"]].append(voice(read_audio(out / clip["audio"])))
    centres = {name: np.mean(voices, 0) for name, voices in known.items()}

    codec = load_codec(CODEC)
    flite = {clip["id"]: read_audio(out / "flite" / f"{clip['id']}.wav") for clip in asked}
    ours = {
        clip["id"]: read_audio(out / "spoken" / f"{clip['id']}.wav")
        for clip in asked
        if (out / "spoken" / f"{clip['id']}.wav").exists()
    }
    again = {id: codec.decode(codec.encode([wave])[0]) for id, wave in flite.items()}
    table = [f"{'':22}{'words wrong (grammar)':>23}{'(open)':>10}{'right voice':>14}"]
    for name, waves in (("flite", flite), ("through the codec", again), ("the model", ours)):
        spoken = [waves.get(clip["id"], np.zeros(SAMPLE_RATE)) for clip in asked]
        said = [clip["text"] for clip in asked]
        wrong = [jiwer.wer(said, heard(listener, spoken)) for listener in listeners]
        right = np.mean(
            [
                clip["speaker"] == max(centres, key=lambda name: centres[name] @ voice(wave))
                for clip, wave in zip(asked, spoken, strict=True)
                if wave.any()
            ]
        )
        table.append(f"{name:22}{wrong[0]:23.1%}{wrong[1]:10.1%}{right:14.1%}")
    lines = [json.loads(line) for line in (out / "spoken/lines.jsonl").read_text().splitlines()]
    stopped = sum(line["stopped"] for line in lines) / len(asked)
    pace = sum(map(len, ours.values())) / sum(len(flite[id]) for id in ours)
    table.append(
        f"{stopped:.1%} of {len(asked)} stop by themselves; {pace:.2f} times flite's length"
    )
    table.append(
        f"seed {options.seed}, {options.hours} hours of speech, {options.steps} steps, width"
        f" {options.width}, {options.layers} layers"
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(".cache/speak"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hours", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--sentences", type=int, default=200, help="unseen ones, to be said")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    asked = make(options.out, options)
    table = measure(options.out, asked, options)
    table.append(f"this piece took {(time.time() - began) / 60:.0f} minutes")
    print("\n".join(table))
    (options.out / "speak.txt").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
