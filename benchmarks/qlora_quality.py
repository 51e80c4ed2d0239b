"""What quantising the frozen weights costs: LoRA over the demo's model kept in bfloat16, int8 and
nf4, else the same to the last bit.

The tiny Llama first half learns recordings by heart, all its weights trained, so that there is
something to lose: the loss at step 1 shows how much is lost. Then adapters on all matrices go on,
with the same start and the same data in the same order. The tiny codec's codes mean nothing, so
other recordings cannot be foretold, and their loss only grows with what was learned.

    JAX_PLATFORMS=cpu python benchmarks/qlora_quality.py
"""

import json
import tempfile
from pathlib import Path

from llasa_jax import cli
from llasa_jax.data.records import open_utterances
from llasa_jax.demo.tiny import make_tiny_codec
from llasa_jax.demo.tiny_llama import SAMPLE_TEXT, make_tiny_llama, make_tiny_tokenizer
from llasa_jax.encode.settings import DataSettings
from llasa_jax.model.settings import LoraSettings, ModelSettings
from llasa_jax.train.loop import train
from llasa_jax.train.settings import LogSettings, OptimizerSettings, Settings, TrainSettings

SPEECH = Path(__file__).parent.parent / "tests" / "speech"
STEPS = 80


def make_model_and_codes(folder: Path) -> None:
    clips = [json.loads(line) for line in (SPEECH / "manifest.jsonl").read_text().splitlines()]
    clips = [clip for clip in clips if clip["speaker"] == "ada"]
    for number, clip in enumerate(clips):
        clip |= {
            "audio": str(SPEECH / clip["audio"]),
            "split": "train" if number < 12 else "validation",
        }
    (folder / "manifest.jsonl").write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    make_tiny_codec(folder / "codec")
    make_tiny_llama(
        folder / "hf", make_tiny_tokenizer([*SAMPLE_TEXT, *(clip["text"] for clip in clips)])
    )
    for command in (
        ["import-hf", folder / "hf", folder / "model"],
        [
            "encode",
            "--manifest",
            folder / "manifest.jsonl",
            "--out",
            folder / "records",
            "--codec",
            folder / "codec",
        ],
    ):
        assert cli.main([str(argument) for argument in command]) == 0


def learn(
    folder: Path, start: str, name: str, learning_rate: float, lora: LoraSettings
) -> list[dict]:
    """Trains from the model `start` and returns the metrics."""
    settings = Settings(
        out=str(folder / name),
        model=ModelSettings(path=str(folder / start), dtype="float32", remat="none", loss_chunk=64),
        lora=lora,
        data=DataSettings(path=str(folder / "records"), max_length=256),
        optimizer=OptimizerSettings(learning_rate=learning_rate, weight_decay=0.0),
        train=TrainSettings(steps=STEPS, rows=2, save_every=STEPS, validate_every=STEPS),
        log=LogSettings(every=50, tensorboard=False),
    )
    records = [open_utterances(folder / "records", split) for split in ("train", "validation")]
    train(settings, records[:1], records[1:])
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model_and_codes(folder)
        learn(folder, "model", "base", 5e-3, LoraSettings())
        results = {}
        for kind in ("none", "int8", "nf4"):
            lora = LoraSettings(
                rank=16,
                dropout=0.0,
                targets=["q", "k", "v", "o", "gate", "up", "down"],
                quantize=kind,
            )
            results[kind] = learn(folder, "base", kind, 3e-3, lora)
    print(
        f"\n{'frozen weights':16}{'loss at step 1':>16}{'last ten steps':>16}{'others':>12}   (nats"
        " a token)"
    )
    for kind, lines in results.items():
        losses = [line["loss"] for line in lines if "loss" in line]
        unseen = [line["validation_loss"] for line in lines if "validation_loss" in line][-1]
        name = {"none": "bfloat16"}.get(kind, kind)
        print(f"{name:16}{losses[0]:16.4f}{sum(losses[-10:]) / 10:16.4f}{unseen:12.4f}")


if __name__ == "__main__":
    main()
