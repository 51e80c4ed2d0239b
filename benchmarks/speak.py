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
import shutil
import sys
import time
from pathlib import Path

from spoken_world import (
    NEW_SECONDS,
    NEW_VOICE,
    PHRASES,
    SECONDS,
    VOICES,
    Listeners,
    draw,
    encoded,
    learn,
    make_llama,
    minutes,
    read_lines,
    record,
    run,
    say,
    waves_of,
)

from llasa_jax.codec import load_codec
from llasa_jax.demo import CODEC


def from_nothing(
    out: Path, texts: list[str], phrases: list[str], asked: list[dict], options
) -> None:
    sentences = encoded(out, "train", texts, VOICES, validation=0.01)
    parts = encoded(out, "phrases", [one for one in phrases for _ in VOICES], VOICES)
    sources = [sentences | {"weight": len(texts)}, parts | {"weight": len(phrases) * len(VOICES)}]
    make_llama(out / "hf", texts, options.seed, options.width, options.layers)
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
        "--lora.targets=[q,k,v,o,gate,up,down,embed]",
    )
    say(out, "new_after_lora", out / "new_lora", asked)


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
    stopped = sum(line["stopped"] for line in read_lines(out / "spoken/lines.jsonl")) / len(asked)
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(".cache/speak"))
    parser.add_argument("--results", type=Path, help="keep the tables and five wavs here too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpu", action="store_true", help="with other defaults for what follows")
    gpu = "--gpu" in sys.argv
    parser.add_argument("--hours", type=float, default=74.0 if gpu else 3.0)
    parser.add_argument(
        "--phrases", type=int, default=1200, help="parts of sentences, in all voices"
    )
    parser.add_argument("--steps", type=int, default=2600 if gpu else 1200)
    parser.add_argument("--rows", type=int, default=16 if gpu else 2)
    parser.add_argument("--sentences", type=int, default=200, help="unseen ones, to be said")
    parser.add_argument("--new-minutes", type=float, default=3.0, help="of the new voice")
    parser.add_argument("--new-steps", type=int, default=150)
    parser.add_argument("--width", type=int, default=256 if gpu else 128)
    parser.add_argument("--layers", type=int, default=8 if gpu else 6)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
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
    few = texts[: max(1, int(options.new_minutes * 60 / NEW_SECONDS))]
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
