"""DPO and GRPO in the spoken world: `python benchmarks/preference.py`.

The model that `speak.py` trained learns further from its own speech alone, without recordings: by
DPO from pairs that `prefer` makes of the best and the worst of several samples, and by GRPO. What
is rewarded is what PocketSphinx hears with the world's grammar. What is measured are greedy
speeches of sentences that are in neither's training data: the word errors that the reward counts,
and what it does not: word errors of the open recogniser, whose voice it is (Resemblyzer), DNSMOS,
how many stop by themselves, and the pace. Give `--texts 8 --rounds 2 --seeds 1 --group-texts 4
--sentences 8` to try it.

The tables are also written to `preference.txt` in `--out`. The same command goes on where it was
stopped. It takes many hours on two cores; `--gpu` does it on a GPU with more texts and rounds.
Needs `python benchmarks/speak.py` with its `--out` before, and the extra `evaluate` with
Resemblyzer.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from spoken_world import (
    VOICES,
    Listeners,
    draw,
    grammar,
    minutes,
    read_lines,
    record,
    run,
    say,
    waves_of,
    write_lines,
)

from llasa_jax.demo import CODEC
from llasa_jax.evaluate.voices import dnsmos

SAMPLING = ("--temperature", "0.9", "--top-k", "75", "--top-p", "0.95")
LONGEST = 6.0  # seconds of speech; the world's longest sentences take about 5


def texts_to_learn(out: Path, count: int, seed: int, asked: list[dict]) -> Path:
    """Texts for the model to speak, none of those that are asked afterwards."""
    texts = draw(count, seed + 2, frozenset(clip["text"] for clip in asked))
    rows = [
        {"id": f"t{at:06d}", "text": text, "speaker": VOICES[at % len(VOICES)]}
        for at, text in enumerate(texts)
    ]
    return write_lines(out / "to_learn.jsonl", rows)


def make_pairs(out: Path, release: Path, texts: Path, scorer: str, options) -> Path:
    run(
        *("prefer", release, "--texts", texts, "--out", out / "pairs", "--codec", CODEC),
        *("--device", "jax", "--samples", options.samples, "--scorer", scorer, *SAMPLING),
        *("--pairs", options.pairs, "--rows", options.rows, "--dtype", "float32"),
        *("--scorer-processes", options.scorer_processes),
    )
    return out / "pairs"


def align(out: Path, name: str, release: Path, options, *more) -> Path:
    """Trains OUT/`name` from the release, by the settings of preference training `more`."""
    run(
        *("train", f"--out={out / name}", f"--model.path={release}", "--model.remat=none"),
        *(f"--model.dtype={options.dtype}", "--train.keep=1", "--optimizer.weight_decay=0"),
        *("--data.max_length=1024", *more),
    )
    return out / name


def by_dpo(out: Path, release: Path, pairs: Path, seed: int, options) -> Path:
    return align(
        *(out, f"dpo_{seed}", release, options, f"--data.path={pairs}", "--align.loss=dpo"),
        *(f"--train.rows={options.dpo_rows}", f"--train.epochs={options.dpo_epochs}"),
        *(f"--align.dpo.beta={options.beta}", f"--align.dpo.supervised={options.supervised}"),
        *(f"--optimizer.learning_rate={options.dpo_rate}", f"--train.seed={seed}"),
        "--train.save_every=20",
    )


def by_grpo(out: Path, release: Path, texts: Path, scorer: str, seed: int, options) -> Path:
    # Not wer, by which "one two three" is one word: 123.
    rewards = [{"score": "cer", "shape": "tanh", "scale": 3.0}]
    speeches = options.group_texts * options.samples
    return align(
        *(out, f"grpo_{seed}", release, options, f"--data.path={texts}", "--align.loss=grpo"),
        # Three speeches of the greatest length fit into a row.
        f"--train.rows={-(-speeches // 3)}",
        f"--train.steps={options.rounds * options.updates}",
        f"--align.grpo.updates={options.updates}",
        *(f"--align.grpo.scorers={json.dumps([scorer])}", "--align.grpo.language=en"),
        *(f"--align.grpo.rewards={json.dumps(rewards)}", "--align.grpo.epsilon_high=0.28"),
        *(f"--align.grpo.texts={options.group_texts}", f"--align.grpo.samples={options.samples}"),
        *(f"--align.grpo.rows={speeches}", f"--align.grpo.max_seconds={LONGEST}"),
        *("--align.grpo.temperature=0.9", "--align.grpo.top_p=0.95", "--train.save_every=10"),
        *(f"--align.grpo.processes={options.scorer_processes}", "--optimizer.schedule=constant"),
        *(f"--log.codec={CODEC}", "--log.codec_device=jax", f"--train.seed={seed}"),
        f"--optimizer.learning_rate={options.grpo_rate}",
    )


def measured(folder: Path, asked: list[dict], flite: dict, listeners: Listeners, quality) -> str:
    """A line of the table: what is heard of a folder of speech."""
    waves = waves_of(folder, asked)
    line = listeners.line(folder.name.removeprefix("said_"), asked, waves)
    scores = quality(list(waves.values()))["dnsmos"]
    stopped = sum(row["stopped"] for row in read_lines(folder / "lines.jsonl")) / len(asked)
    pace = sum(map(len, waves.values())) / sum(len(flite[id]) for id in waves)
    return f"{line}{np.mean(scores):9.2f}{stopped:10.1%}{pace:7.2f}"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speak", type=Path, default=Path(".cache/speak"), help="speak.py's --out")
    parser.add_argument("--out", type=Path, default=Path(".cache/preference"))
    parser.add_argument("--seed", type=int, default=0, help="of the texts")
    parser.add_argument("--seeds", type=int, default=2, help="of DPO and GRPO")
    parser.add_argument("--gpu", action="store_true", help="with other defaults for what follows")
    gpu = "--gpu" in sys.argv
    parser.add_argument("--sentences", type=int, default=600, help="unseen ones, to be said")
    texts = 2400 if gpu else 240
    parser.add_argument("--texts", type=int, default=texts, help="that it speaks to learn from")
    parser.add_argument("--samples", type=int, default=8, help="speeches of each")
    parser.add_argument("--pairs", type=int, default=2, help="of each text")
    rows = 512 if gpu else 64
    parser.add_argument("--rows", type=int, default=rows, help="speeches drawn at once for DPO")
    parser.add_argument("--rounds", type=int, default=150 if gpu else 40, help="of GRPO")
    parser.add_argument("--updates", type=int, default=1, help="steps of a round of GRPO")
    group_texts = 16 if gpu else 4
    parser.add_argument(
        "--group-texts", type=int, default=group_texts, help="texts of a round of GRPO"
    )
    cores = os.cpu_count() or 1
    parser.add_argument("--scorer-processes", type=int, default=max(1, cores - 2))
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--supervised", type=float, default=0.5)
    parser.add_argument("--dpo-rows", type=int, default=8 if gpu else 4)
    parser.add_argument("--dpo-epochs", type=float, default=1)
    parser.add_argument("--dpo-rate", type=float, default=5e-5)
    # With 1.5e-4 and two updates of a round a model unlearned (results/preference.txt).
    parser.add_argument("--grpo-rate", type=float, default=2e-5 if gpu else 1e-4)
    return parser


def main() -> None:
    options = arguments().parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if options.gpu else "cpu")
    out, began = options.out, time.time()
    out.mkdir(parents=True, exist_ok=True)
    known = frozenset(clip["text"] for clip in read_lines(options.speak / "train.jsonl"))
    # The first ones are those that speak.py asks, where both have one seed.
    asked = record(out / "flite", draw(options.sentences, options.seed + 1, known), "u")
    to_learn = texts_to_learn(out, options.texts, options.seed, asked)
    rules = out / "world.gram"
    rules.write_text(grammar())
    scorer, release = f"pocketsphinx:{rules}", options.speak / "release"
    spoken = {"before": release}
    pairs = make_pairs(out, release, to_learn, scorer, options)
    for seed in range(options.seeds):
        spoken[f"dpo_{seed}"] = by_dpo(out, release, pairs, seed, options)
        spoken[f"grpo_{seed}"] = by_grpo(out, release, to_learn, scorer, seed, options)
    listeners, quality = Listeners(options.speak), dnsmos("cpu")
    flite = waves_of(out / "flite", asked)
    table = [
        f"{len(asked)} texts in no training data, spoken greedily",
        f"{'':30}{'words wrong (grammar)':>22}{'(open)':>10}{'right voice':>14}{'DNSMOS':>9}"
        f"{'stopped':>10}{'pace':>7}",
        listeners.line("flite", asked, flite),
    ]
    for name, model in spoken.items():
        say(out, f"said_{name}", model, asked, temperature=0.0)
        table.append(measured(out / f"said_{name}", asked, flite, listeners, quality))
    given = {name: str(value) for name, value in vars(options).items()}
    table.append(", ".join(f"{name} {value}" for name, value in given.items()))
    took = {name: f"{minutes(out / name):.0f}" for name in spoken if name != "before"}
    table.append(f"minutes of training: {took}; this piece {(time.time() - began) / 60:.0f}")
    print("\n".join(table))
    (out / "preference.txt").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
