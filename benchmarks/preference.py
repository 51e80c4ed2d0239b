"""DPO and GRPO in a part of the spoken world: `python benchmarks/preference.py`.

A small Llasa learns from random weights to say "call NAME on", and five digits, in two of flite's
voices, and is stopped while it still says words wrong. Then it learns from its own speech of other
texts alone: by DPO from pairs that `prefer` makes of the best and the worst of several samples, and
by GRPO. What is rewarded is what PocketSphinx hears with the world's grammar. What is measured are
greedy speeches of texts that were in no training: the word errors that the reward counts, and what
it does not: word errors of the open recogniser, whose voice it is (Resemblyzer), DNSMOS, how many
stop by themselves, and the pace. Give `--sentences 60 --steps 20 --texts 8 --rounds 2 --asked 6
--seeds 1` to try it.

The tables are also written to `preference.txt` in `--out`. The same command goes on where it was
stopped. It takes hours on two cores. Needs flite, and the extra `evaluate` with Resemblyzer.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from spoken_world import (
    PHRASES,
    Listeners,
    draw,
    encoded,
    grammar,
    learn,
    make_llama,
    minutes,
    record,
    run,
    say,
    waves_of,
    write_lines,
)

from llasa_jax.demo import CODEC
from llasa_jax.evaluate.voices import dnsmos

VOICES = "slt", "rms"
SENTENCES = ("call <name> on <digit> <digit> <digit> <digit> <digit>",)
PARTS = tuple(
    phrase
    for phrase in (*PHRASES, "call <name> on <digit>", "on <digit> <digit>")
    if not set(phrase.split()) - {"call", "on", "<name>", "<digit>"}
)
SAMPLING = ("--temperature", "0.6", "--top-k", "75", "--top-p", "0.95")


def lines_of(texts: list[str], prefix: str) -> list[dict]:
    return [
        {"id": f"{prefix}{at:06d}", "text": text, "speaker": VOICES[at % len(VOICES)]}
        for at, text in enumerate(texts)
    ]


def speaking(out: Path, texts: list[str], options) -> Path:
    """The model that both begin with, as a HF folder."""
    phrases = draw(options.phrases, options.seed, patterns=PARTS)
    sources = [
        encoded(out, "train", texts, VOICES, validation=0.02) | {"weight": len(texts)},
        encoded(out, "phrases", [each for each in phrases for _ in VOICES], VOICES)
        | {"weight": len(phrases) * len(VOICES)},
    ]
    make_llama(out / "hf", texts, options.seed, options.width, options.layers)
    run("import-hf", out / "hf", out / "model")
    learn(
        *(out, "run", out / "model", sources, options.steps),
        *(f"--optimizer.learning_rate={options.learning_rate}", "--optimizer.weight_decay=0.1"),
        *("--train.rows=2", "--train.validate_every=100", "--model.dtype=float32"),
    )
    run("export-hf", out / "run", out / "release")
    return out / "release"


def align(out: Path, name: str, release: Path, *more) -> Path:
    """Trains OUT/`name` from the release, by the settings of preference training `more`."""
    run(
        *("train", f"--out={out / name}", f"--model.path={release}", "--model.remat=none"),
        *("--model.dtype=float32", "--train.keep=1", "--optimizer.weight_decay=0", *more),
    )
    return out / name


def by_dpo(out: Path, release: Path, seed: int, options) -> Path:
    return align(
        *(out, f"dpo_{seed}", release, f"--data.path={out / 'pairs'}", "--align.loss=dpo"),
        *("--data.max_length=1024", "--train.rows=2", f"--train.epochs={options.dpo_epochs}"),
        *(f"--align.dpo.beta={options.beta}", f"--align.dpo.supervised={options.supervised}"),
        *(f"--optimizer.learning_rate={options.dpo_rate}", f"--train.seed={seed}"),
        "--train.save_every=20",
    )


def by_grpo(out: Path, release: Path, texts: Path, scorer: str, seed: int, options) -> Path:
    # Not wer, by which "one two three" is one word: 123.
    rewards = [{"score": "cer", "shape": "tanh", "scale": 1.0}]
    return align(
        *(out, f"grpo_{seed}", release, f"--data.path={texts}", "--align.loss=grpo"),
        *("--data.max_length=1024", "--train.rows=8", f"--train.steps={options.rounds}"),
        *(f"--align.grpo.scorers={json.dumps([scorer])}", "--align.grpo.language=en"),
        *(f"--align.grpo.rewards={json.dumps(rewards)}", "--align.grpo.texts=4"),
        *(
            "--align.grpo.samples=8",
            "--align.grpo.rows=32",
            "--align.grpo.max_seconds=3.8",
            "--align.grpo.epsilon_high=0.28",
        ),
        *("--align.grpo.temperature=0.6", "--align.grpo.top_p=0.95", "--train.save_every=10"),
        *(f"--log.codec={CODEC}", "--log.codec_device=jax", f"--train.seed={seed}"),
        f"--optimizer.learning_rate={options.grpo_rate}",
    )


def measured(out: Path, name: str, asked: list[dict], listeners: Listeners, quality) -> str:
    """A line of the table: what is heard of OUT/`name`."""
    waves = waves_of(out / name, asked)
    line = listeners.line(name, asked, waves)
    scores = quality(list(waves.values()))["dnsmos"]
    rows = [json.loads(row) for row in (out / name / "lines.jsonl").read_text().splitlines()]
    stopped = sum(row["stopped"] for row in rows) / len(asked)
    flite = waves_of(out / "flite", asked)
    pace = sum(map(len, waves.values())) / sum(len(flite[id]) for id in waves)
    return f"{line}{np.mean(scores):9.2f}{stopped:10.1%}{pace:7.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(".cache/preference"))
    parser.add_argument("--seed", type=int, default=0, help="of the texts and the first model")
    parser.add_argument("--seeds", type=int, default=2, help="of DPO and GRPO")
    parser.add_argument("--sentences", type=int, default=2400)
    parser.add_argument("--phrases", type=int, default=400, help="parts of them, in both voices")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--texts", type=int, default=300, help="that it speaks to learn from")
    parser.add_argument("--samples", type=int, default=8, help="of each, for the pairs")
    parser.add_argument("--pairs", type=int, default=2, help="of each text")
    parser.add_argument("--rounds", type=int, default=40, help="of GRPO, of 4 texts")
    parser.add_argument("--asked", type=int, default=100, help="unseen texts, to be measured")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--supervised", type=float, default=0.5)
    parser.add_argument("--dpo-epochs", type=float, default=1)
    parser.add_argument("--dpo-rate", type=float, default=5e-5)
    parser.add_argument("--grpo-rate", type=float, default=1e-4)
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    out, began = options.out, time.time()
    out.mkdir(parents=True, exist_ok=True)
    unseen = draw(options.asked + options.texts, options.seed + 1, patterns=SENTENCES)
    texts = draw(options.sentences, options.seed, frozenset(unseen), SENTENCES)
    asked = record(out / "flite", unseen[: options.asked], "u", VOICES)
    to_learn = write_lines(out / "to_learn.jsonl", lines_of(unseen[options.asked :], "t"))
    rules = out / "world.gram"
    rules.write_text(grammar(SENTENCES))
    scorer = f"pocketsphinx:{rules}"
    release = speaking(out, texts, options)
    spoken = {"before": release}
    run(
        *("prefer", release, "--texts", to_learn, "--out", out / "pairs", "--codec", CODEC),
        *("--device", "jax", "--samples", options.samples, "--scorer", scorer, *SAMPLING),
        *("--pairs", options.pairs, "--rows", "64", "--dtype", "float32"),
    )
    for seed in range(options.seeds):
        spoken[f"dpo_{seed}"] = by_dpo(out, release, seed, options)
        spoken[f"grpo_{seed}"] = by_grpo(out, release, to_learn, scorer, seed, options)
    listeners, quality = Listeners(out, ("train.jsonl",), SENTENCES), dnsmos("cpu")
    table = [
        f"{len(asked)} texts in no training data, spoken greedily",
        f"{'':30}{'words wrong (grammar)':>22}{'(open)':>10}{'right voice':>14}{'DNSMOS':>9}"
        f"{'stopped':>10}{'pace':>7}",
        listeners.line("flite", asked, waves_of(out / "flite", asked)),
    ]
    for name, model in spoken.items():
        say(out, f"said_{name}", model, asked, temperature=0.0)
        table.append(measured(out, f"said_{name}", asked, listeners, quality))
    given = {name: value for name, value in vars(options).items() if name != "out"}
    table.append(", ".join(f"{name} {value:g}" for name, value in given.items()))
    took = {name: f"{minutes(out / name):.0f}" for name in ("run", *spoken) if name != "before"}
    table.append(f"minutes of training: {took}; this piece {(time.time() - began) / 60:.0f}")
    print("\n".join(table))
    (out / "preference.txt").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
