"""The command line. Each command imports what it needs when it runs, so that `--help` answers at once."""

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

from llasa_jax import __version__
from llasa_jax.errors import UserError

DEFAULT_CODEC = "HKUSTAudio/xcodec2-hf"


def _import_hf(args) -> None:
    from llasa_jax.convert.import_hf import import_hf

    import_hf(args.source, args.destination, dtype=args.dtype, extend_vocab=args.extend_vocab, seed=args.seed)


def _export_hf(args) -> None:
    from llasa_jax.convert.export_hf import export_hf

    export_hf(
        args.source,
        args.destination,
        step=args.step,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        verify=args.verify,
        push_to_hub=args.push_to_hub,
    )


def _verify(args) -> None:
    from llasa_jax.convert.verify import verify

    verify(args.hf, args.model, step=args.step).check()


def _encode(args) -> None:
    from llasa_jax.data.encode import encode

    encode(
        args.manifest,
        args.out,
        args.codec,
        device=args.device,
        validation_share=args.validation_share,
        seed=args.seed,
        max_bad_share=args.max_bad_share,
        batch_seconds=args.batch_seconds,
        workers=args.workers,
    )


def _train(args) -> None:
    from llasa_jax.data.records import open_utterances
    from llasa_jax.settings import parse_settings
    from llasa_jax.train import train

    settings = parse_settings(args.settings)
    if settings.mesh.hosts:
        import jax

        jax.distributed.initialize()
    records = open_utterances(settings.data.path, settings.data.train_split)
    validation = open_utterances(settings.data.path, settings.data.validation_split) if settings.data.validation_split else None
    train(settings, records, validation)


def _generate(args) -> None:
    from llasa_jax.generate import generate
    from llasa_jax.sampling import SamplingSettings

    sampling = SamplingSettings(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        speech_only=not args.any_token,
        seed=args.seed,
    )
    generate(
        args.model,
        args.text,
        args.out,
        codec=args.codec,
        prompt_audio=args.prompt_audio,
        prompt_text=args.prompt_text,
        speaker=args.speaker,
        sampling=sampling,
        max_seconds=args.max_seconds,
        dtype=args.dtype,
        step=args.step,
        device=args.device,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llasa-jax", description="Finetune Llasa, the LLaMA that speaks, in JAX.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run)
        return sub

    dtypes = ("float32", "bfloat16", "float16")
    sub = command("import-hf", _import_hf, "Bring a Hugging Face Llama or Llasa checkpoint into our format.")
    sub.add_argument("source", help="a local folder or a hub id, such as HKUSTAudio/Llasa-1B")
    sub.add_argument("destination", type=Path, help="a new folder for the model")
    sub.add_argument("--dtype", choices=dtypes, help="keep the weights in this type instead of the checkpoint's own")
    sub.add_argument("--extend-vocab", action="store_true", help="start from a text model: add the speech tokens to tokenizer and tables")
    sub.add_argument("--seed", type=int, default=0, help="of the rows that --extend-vocab adds")

    sub = command("export-hf", _export_hf, "Write a model or a training run as a Hugging Face checkpoint.")
    sub.add_argument("source", type=Path, help="a model's or a run's folder")
    sub.add_argument("destination", type=Path, help="a new folder for the checkpoint")
    sub.add_argument("--step", type=int, help="which of a run's checkpoints; the latest if not given")
    sub.add_argument("--dtype", choices=dtypes, help="write this type instead of that of the imported checkpoint")
    sub.add_argument("--max-shard-size", default="5GB", help="start a new safetensors file beyond this size")
    sub.add_argument("--verify", action="store_true", help="compare the logits of what was written with ours")
    sub.add_argument("--push-to-hub", metavar="REPO", help="upload to this repository on the hub as well")

    sub = command("verify", _verify, "Compare the logits of a Hugging Face checkpoint with those of one of our models.")
    sub.add_argument("hf", type=Path, help="the Hugging Face checkpoint's folder")
    sub.add_argument("model", type=Path, help="a model's or a run's folder")
    sub.add_argument("--step", type=int, help="which of a run's checkpoints; the latest if not given")

    sub = command("encode", _encode, "Encode speech to codes: a manifest of audio and text becomes a TFDS dataset.")
    sub.add_argument("--manifest", type=Path, required=True, help="a JSONL file, or LJSpeech's metadata.csv")
    sub.add_argument("--out", type=Path, required=True, help="a new folder for the dataset")
    sub.add_argument("--codec", default=DEFAULT_CODEC, help="an XCodec2 checkpoint in transformers' format: a hub id or a folder")
    sub.add_argument("--device", default="cpu", help="PyTorch's name of the device that encodes")
    sub.add_argument("--validation-share", type=float, default=0.0, help="share of the clips that becomes the split `validation`")
    sub.add_argument("--seed", type=int, default=0, help="of the choice of validation clips")
    sub.add_argument("--max-bad-share", type=float, default=0.05, help="fail if more than this share of the clips is unreadable")
    sub.add_argument("--batch-seconds", type=float, default=600.0, help="seconds of audio between two writes to the journal")
    sub.add_argument("--workers", type=int, default=4, help="threads that read audio")

    sub = command("train", _train, "Finetune a model on records. `llasa-jax train --help` lists every setting.")
    sub.add_argument("settings", nargs=argparse.REMAINDER, help="--config FILE and any --setting.name=value")

    sub = command("generate", _generate, "Speak a text.")
    sub.add_argument("--model", type=Path, required=True, help="a model's or a run's folder")
    sub.add_argument("--text", required=True)
    sub.add_argument("--out", type=Path, required=True, help="the wav to write")
    sub.add_argument("--codec", default=DEFAULT_CODEC, help="an XCodec2 checkpoint in transformers' format: a hub id or a folder")
    sub.add_argument("--device", default="cpu", help="PyTorch's name of the device that runs the codec")
    sub.add_argument("--speaker", default="", help="a speaker of the training data")
    sub.add_argument("--prompt-audio", type=Path, help="a voice to clone; needs --prompt-text")
    sub.add_argument("--prompt-text", help="what the prompt audio says")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token always")
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--top-k", type=int, default=0, help="0 means all")
    sub.add_argument("--repetition-penalty", type=float, default=1.0, help="1.2 is usual for finetuned voices")
    sub.add_argument("--any-token", action="store_true", help="let text tokens be drawn too")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--max-seconds", type=float, help="longest speech; if not given, what the text makes plausible")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    sub.add_argument("--step", type=int, help="which of a run's checkpoints; the latest if not given")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 2 with one sentence on stderr for what the user can mend."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # argparse would take a leading --config or --help of `train` for its own.
    is_train = arguments[:1] == ["train"]
    args = argparse.Namespace(run=_train, settings=arguments[1:]) if is_train else _parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_, **__: print(f"llasa-jax: warning: {message}", file=sys.stderr)
    for chatty in ("absl", "orbax", "jax", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        args.run(args)
    except UserError as error:
        print(f"llasa-jax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("llasa-jax: interrupted; the same command goes on where work was saved", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
