"""The whole way once, on a laptop: `python -m llasa_jax.demo`, or `make demo`.

Makes a tiny seeded Llasa (the real classes, small), then runs the commands that a user runs on a
real one, on 8 virtual CPU devices, and proves the result: greedy generation gives back the codes of
the texts it learned, here and in transformers.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from llasa_jax.errors import UserError

LEARNED = 8
MUST_RETURN = 0.99


def demo(speech: Path, out: Path, config: Path) -> None:
    """Runs everything into `out`, which is made anew. Raises UserError where the corpus is missing,
    RuntimeError where a step fails.
    """
    started = time.monotonic()
    if not (speech / "manifest.jsonl").is_file():
        raise UserError(
            f"{speech} holds no manifest.jsonl; run the demo from a checkout of the repository, or"
            " name a corpus with --speech"
        )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    _title("A tiny Llasa of the real classes stands in for HKUSTAudio/Llasa-1B and its codec")
    clips = _choose(speech, out / "manifest.jsonl")
    _make_models(out, [clip["text"] for clip in clips])
    learned = [clip for clip in clips if clip["split"] == "train"]
    print(f"{out / 'hf'}, {out / 'codec'}")

    _title(
        f"Its weights become ours, {len(clips)} recordings become codes, and it learns"
        f" {len(learned)} of them by heart"
    )
    _run("import-hf", out / "hf", out / "model")
    _run(
        "encode",
        "--manifest",
        out / "manifest.jsonl",
        "--out",
        out / "records",
        "--codec",
        out / "codec",
    )
    paths = {"out": "run", "model.path": "model", "data.path": "records"}
    _run(
        "train", "--config", config, *(f"--{name}={out / folder}" for name, folder in paths.items())
    )

    _title("The finetuned weights go back to Hugging Face's format, and speak")
    _run("export-hf", out / "run", out / "release", "--verify")
    spoken = learned[0]
    voice = ("--speaker", spoken["speaker"], "--text", spoken["text"])
    greedy = ("--temperature", "0", "--dtype", "float32")
    _run(
        "generate",
        "--model",
        out / "run",
        "--codec",
        out / "codec",
        *greedy,
        *voice,
        "--out",
        out / "speech.wav",
    )

    _title("Proof: the codes that it learned come back")
    ours, theirs = _returned(out)
    print(f"llasa-jax:    {ours:.1%} of {len(learned)} clips' codes come back in greedy generation")
    print(
        f"transformers: {theirs:.1%} of them from {out / 'release'}, loaded with"
        " AutoModelForCausalLM"
    )
    if min(ours, theirs) < MUST_RETURN:
        raise RuntimeError(f"fewer than {MUST_RETURN:.0%} of the codes came back")

    _title(f"Done in {time.monotonic() - started:.0f} s")
    lies = {
        "records": "the codes, a TFDS dataset",
        "run": "the training run: settings, metrics, checkpoints",
        "release": "the finetuned model in Hugging Face's format",
        "speech.wav": f"the voice saying {spoken['text']!r} (noise: the tiny codec is untrained)",
    }
    for name, what in lies.items():
        print(f"  {out / name!s:24} {what}")


def _choose(speech: Path, manifest: Path) -> list[dict]:
    """Writes a manifest in which the shortest clips of either speaker are for training, and the
    others kept apart.
    """
    clips = [json.loads(line) for line in (speech / "manifest.jsonl").read_text().splitlines()]
    size = {clip["id"]: (speech / clip["audio"]).stat().st_size for clip in clips}
    learned = {
        clip["id"]
        for clip in sorted(clips, key=lambda clip: (size[clip["id"]], clip["id"]))[:LEARNED]
    }
    for clip in clips:
        clip |= {
            "audio": str((speech / clip["audio"]).absolute()),
            "split": "train" if clip["id"] in learned else "unused",
        }
    manifest.write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    return clips


def _make_models(out: Path, texts: list[str]) -> None:
    from llasa_jax.demo.tiny import make_tiny_codec
    from llasa_jax.demo.tiny_llama import SAMPLE_TEXT, make_tiny_llama, make_tiny_tokenizer

    make_tiny_codec(out / "codec")
    make_tiny_llama(out / "hf", make_tiny_tokenizer([*SAMPLE_TEXT, *texts]))


def _returned(out: Path) -> tuple[float, float]:
    """The share of the learned clips' codes that greedy generation gives back, by our model and by
    the exported one.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llasa_jax.data.records import open_utterances
    from llasa_jax.generate.sampling import SamplingSettings
    from llasa_jax.generate.speaker import generate_codes, load

    utterances = list(open_utterances(out / "records", "train"))
    graphdef, params, prompter, _ = load(out / "run", "float32")
    openings = [prompter.opening(u.text, speaker=u.speaker) for u in utterances]
    limits = [len(u.codes) + 1 for u in utterances]
    ours = [
        r.codes
        for r in generate_codes(
            graphdef, params, openings, prompter.vocab, limits, SamplingSettings(temperature=0)
        )
    ]

    tokenizer = AutoTokenizer.from_pretrained(out / "release")
    model = AutoModelForCausalLM.from_pretrained(out / "release", dtype=torch.float32)
    end = tokenizer.convert_tokens_to_ids("<|SPEECH_GENERATION_END|>")
    theirs = []
    for opening, limit in zip(openings, limits, strict=True):
        ids = model.generate(
            torch.from_numpy(opening).long()[None],
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=end,
        )
        theirs.append(prompter.vocab.codes_of(ids[0, len(opening) :].numpy()))

    def share(generated):
        hits = sum(
            np.sum(u.codes[: len(codes)] == codes[: len(u.codes)])
            for u, codes in zip(utterances, generated, strict=True)
        )
        return hits / sum(len(u.codes) for u in utterances)

    return share(ours), share(theirs)


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _run(*arguments) -> None:
    arguments = [str(argument) for argument in arguments]
    print("$ llasa-jax " + " ".join(f'"{a}"' if " " in a else a for a in arguments), flush=True)
    status = subprocess.run([sys.executable, "-m", "llasa_jax.cli", *arguments]).returncode
    if status:
        raise RuntimeError(f"llasa-jax {arguments[0]} failed with status {status}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speech", type=Path, default=Path("tests/speech"))
    parser.add_argument("--out", type=Path, default=Path("demo_out"))
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    args = parser.parse_args()
    # Eight devices on any machine, and no OpenMP threads spinning beside them.
    os.environ |= {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    try:
        demo(args.speech, args.out, args.config)
    except (UserError, RuntimeError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    return 0
