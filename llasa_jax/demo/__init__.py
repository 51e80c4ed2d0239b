"""The whole way once, on a laptop: `python -m llasa_jax.demo`, or `make demo`.

Makes a tiny Llasa from a seed (the real classes, small), then runs the commands that a user runs on
a real one, on 8 virtual CPU devices, with the small codec of this folder and eight recorded
sentences, and proves the result: greedy generation gives back the codes of the texts that it was
trained on, here and in transformers, and a recogniser understands the speech.

Run it in a checkout of the repository: its settings are in `configs/demo.yaml`, which is not part
of an installed package.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from llasa_jax.errors import UserError
from llasa_jax.speech.audio import SAMPLE_RATE

HERE = Path(__file__).parent
CODEC = HERE / "codec"
MARK = ".demo"  # in a folder that a demo may replace
MUST_RETURN = 0.99  # of their codes


def demo(speech: Path, out: Path, config: Path) -> None:
    """Runs everything into the folder `out`, which it replaces. Raises UserError where something
    that it needs is missing, RuntimeError where a command fails.
    """
    started = time.monotonic()
    for path, option in ((speech / "manifest.jsonl", "--speech"), (config, "--config")):
        if not path.is_file():
            raise UserError(
                f"there is no {path}; run the demo in a checkout of the repository, or give"
                f" {option}"
            )
    if out.exists() and not (out / MARK).is_file():
        raise UserError(
            f"{out} was not made by the demo, which would replace it; give another --out"
        )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).touch()

    _title("A tiny Llasa and a small codec stand in for HKUSTAudio/Llasa-1B and XCodec2")
    manifest = speech / "manifest.jsonl"
    clips = [json.loads(line) for line in manifest.read_text().splitlines()]
    _make_llama(out / "hf", [clip["text"] for clip in clips])
    print(f"{out / 'hf'}, {CODEC}")

    _title(
        f"Import the weights, encode {len(clips)} recordings, and train on them until they are"
        " known by heart"
    )
    _run("import-hf", out / "hf", out / "model")
    _run(
        "encode",
        "--manifest",
        manifest,
        "--out",
        out / "records",
        "--codec",
        CODEC,
    )
    paths = {"out": "run", "model.path": "model", "data.path": "records"}
    _run(
        "train", "--config", config, *(f"--{name}={out / folder}" for name, folder in paths.items())
    )

    _title("Export the trained weights to Hugging Face's format, and speak")
    _run("export-hf", out / "run", out / "release", "--verify")
    greedy = ("--temperature", "0", "--dtype", "float32")
    models = ("--model", out / "run", "--codec", CODEC)
    lines = [{key: clip[key] for key in ("id", "text", "speaker")} for clip in clips]
    (out / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _run("generate", *models, *greedy, "--lines", out / "lines.jsonl", "--out", out / "spoken")

    _title("Proof: the codes of the training clips come back")
    ours, theirs = _returned(out)
    print(f"llasa-jax:    {ours:.1%} of {len(clips)} clips' codes come back in greedy generation")
    print(
        f"transformers: {theirs:.1%} of them from {out / 'release'}, loaded with"
        " AutoModelForCausalLM"
    )
    if min(ours, theirs) < MUST_RETURN:
        raise RuntimeError(f"fewer than {MUST_RETURN:.0%} of the codes came back")

    _title("What a recogniser, PocketSphinx, hears in it")
    _listen(out / "spoken", clips)

    _title(f"Done in {time.monotonic() - started:.0f} s")
    made = {
        "records": "the codes, a TFDS dataset",
        "run": "the training run: settings, metrics, checkpoints",
        "release": "the finetuned model in Hugging Face's format",
        "spoken": "the sentences, spoken by the finetuned model",
    }
    for name, what in made.items():
        print(f"  {out / name!s:24} {what}")


def _make_llama(folder: Path, texts: list[str]) -> None:
    from llasa_jax.demo.tiny_llama import SAMPLE_TEXT, make_tiny_llama, make_tiny_tokenizer

    make_tiny_llama(folder, make_tiny_tokenizer([*SAMPLE_TEXT, *texts]))


def _listen(spoken: Path, clips: list[dict]) -> None:
    """Prints what is heard in each clip's wav, and how many of all words are right."""
    from llasa_jax.evaluate.recognisers import pocketsphinx
    from llasa_jax.speech.audio import read_audio

    try:
        recogniser = pocketsphinx()
    except UserError as error:
        print(f"not asked: {error}")
        return
    silence = np.zeros(SAMPLE_RATE // 5, np.float32)  # it misses words at a wav's very ends
    waves = [read_audio(spoken / f"{clip['id']}.wav") for clip in clips]
    transcripts = recogniser.transcribe(
        [np.concatenate([silence, wave, silence]) for wave in waves]
    )
    texts = [clip["text"] for clip in clips]
    for text, words in zip(texts, transcripts, strict=True):
        print(f"  {text:36} {words}")
    lengths = [len(text.split()) for text in texts]
    right = 1 - np.average(recogniser.rates(texts, transcripts)["wer"], weights=lengths)
    print(f"{right:.0%} of {sum(lengths)} words are understood")


def _returned(out: Path) -> tuple[float, float]:
    """The share of the training clips' codes that greedy generation gives back: by our model, and
    by the exported one in transformers.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llasa_jax.data.records import open_utterances
    from llasa_jax.generate.decode import generate_codes
    from llasa_jax.generate.sampling import SamplingSettings
    from llasa_jax.generate.speaker import load

    utterances = list(open_utterances(out / "records", "train"))
    trained = [np.asarray(utterance.codes) for utterance in utterances]
    graphdef, params, prompter, _ = load(out / "run", "float32")
    openings = [prompter.opening(u.text, speaker=u.speaker) for u in utterances]
    limits = [len(codes) + 1 for codes in trained]  # and the end marker
    greedy = SamplingSettings(temperature=0)
    generated = generate_codes(graphdef, params, openings, prompter.vocab, limits, greedy)
    ours = [result.codes for result in generated]

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

    def share(spoken: list[np.ndarray]) -> float:
        """The share of the training clips' codes at whose place the same code was spoken."""
        hits = 0
        for codes, wanted in zip(spoken, trained, strict=True):
            common = min(len(codes), len(wanted))
            hits += int(np.sum(codes[:common] == wanted[:common]))
        return hits / sum(map(len, trained))

    return share(ours), share(theirs)


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _run(*arguments: str | Path) -> None:
    words = [str(argument) for argument in arguments]
    print("$ " + shlex.join(["llasa-jax", *words]), flush=True)
    status = subprocess.run([sys.executable, "-m", "llasa_jax.cli", *words]).returncode
    if status:
        raise RuntimeError(f"llasa-jax {words[0]} failed with status {status}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speech", type=Path, default=HERE / "speech")
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
