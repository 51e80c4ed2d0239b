"""Commands that convert and compare models: import-hf, export-hf, verify."""

import argparse

from llasa_jax.cli.arguments import DTYPES, SEED, add_base, add_command, add_step
from llasa_jax.errors import UserError
from llasa_jax.runtime.settings import text
from llasa_jax.runtime.storage import as_path

SMALLEST_SHARD = 1_000_000  # bytes; with less, a model is one file a tensor
REPOSITORY = text("a repository such as NAME/my-voice", r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def import_hf(args) -> None:
    from llasa_jax.convert.import_hf import import_hf

    import_hf(
        source=args.source,
        destination=args.destination,
        dtype=args.dtype,
        extend_vocab=args.extend_vocab,
        seed=args.seed,
        new_codes=args.new_codes,
    )


def export_hf(args) -> None:
    if args.public and not args.push_to_hub:
        raise UserError("--public says how to upload; give it with --push-to-hub")
    from llasa_jax.convert.export_hf import export_hf

    export_hf(
        source=args.source,
        destination=args.destination,
        step=args.step,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        verify=args.verify,
        push_to_hub=args.push_to_hub,
        public=args.public,
        lora=args.lora,
        base=args.base,
    )


def shard_size(words: str) -> int:
    """Bytes of a size such as 5GB, as an argparse `type`."""
    from llasa_jax.convert.safetensors_io import parse_size

    size = parse_size(words)
    if size < SMALLEST_SHARD:
        raise argparse.ArgumentTypeError(f"must be at least 1MB but is {words}")
    return size


def verify(args) -> None:
    from llasa_jax.convert.verify import verify

    verify(args.hf, args.model, step=args.step, base=args.base).check()


def add_commands(commands) -> None:
    parser = add_command(
        commands,
        "import-hf",
        import_hf,
        "Bring a Hugging Face Llama or Llasa checkpoint into our format.",
    )
    parser.add_argument("source", help="a local folder or a hub id, such as HKUSTAudio/Llasa-1B")
    parser.add_argument("destination", type=as_path, help="a new folder for the model")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="keep the weights in this type instead of the checkpoint's own",
    )
    parser.add_argument(
        "--extend-vocab",
        action="store_true",
        help="start from a text model: add the speech tokens to tokenizer and tables",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of the rows that --extend-vocab adds")
    parser.add_argument(
        "--new-codes",
        choices=["mean", "levels"],
        default="mean",
        help="the rows of codes that --extend-vocab adds: nearly all the mean of the old ones, as"
        " transformers makes them; or codes that sound alike begin alike",
    )

    parser = add_command(
        commands,
        "export-hf",
        export_hf,
        "Write a model or a training run as a Hugging Face checkpoint.",
    )
    parser.add_argument("source", type=as_path, help="a model's or a run's folder")
    parser.add_argument("destination", type=as_path, help="a new folder for the checkpoint")
    add_step(parser)
    add_base(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="write this type instead of that of the imported checkpoint"
    )
    parser.add_argument(
        "--lora",
        choices=("adapter", "merge"),
        help="of a LoRA run: PEFT's adapter alone, or a whole model",
    )
    parser.add_argument(
        "--max-shard-size",
        type=shard_size,
        default="5GB",
        help="start a new safetensors file beyond this size",
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare the logits of what was written with ours"
    )
    parser.add_argument(
        "--push-to-hub",
        type=REPOSITORY,
        metavar="REPO",
        help="upload to this repository on the hub as well; a new one is private",
    )
    parser.add_argument(
        "--public", action="store_true", help="make the new repository on the hub public"
    )

    parser = add_command(
        commands,
        "verify",
        verify,
        "Compare the tensors and the logits of a Hugging Face checkpoint with those of one of our"
        " models.",
    )
    parser.add_argument("hf", type=as_path, help="the Hugging Face checkpoint's folder")
    parser.add_argument("model", type=as_path, help="a model's or a run's folder")
    add_step(parser)
    add_base(parser)
