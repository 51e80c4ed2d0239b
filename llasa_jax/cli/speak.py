"""The command generate."""

from llasa_jax.cli.arguments import SEED, add_base, add_codec, add_command, add_device, add_step
from llasa_jax.errors import UserError
from llasa_jax.runtime.settings import number, text
from llasa_jax.runtime.storage import as_path

LINE = text("one line of text", r"[^\x00-\x1f\x7f]*")


def generate(args) -> None:
    from llasa_jax.convert.peft_adapter import open_adapters
    from llasa_jax.generate.sampling import SamplingSettings
    from llasa_jax.generate.speaker import Line, generate

    sampling = SamplingSettings(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        speech_only=not args.any_token,
        seed=args.seed,
    )
    if len(args.out) != len(args.text):
        raise UserError(
            f"{len(args.text)} texts and {len(args.out)} files to write were given; give an --out"
            " for each --text"
        )
    adapters = open_adapters(args.adapter, args.model, len(args.text))
    generate(
        args.model,
        [Line(*line) for line in zip(args.text, args.out, adapters, strict=True)],
        codec=args.codec,
        prompt_audio=args.prompt_audio,
        prompt_text=args.prompt_text,
        speaker=args.speaker,
        description=args.description,
        language=args.language,
        sampling=sampling,
        max_seconds=args.max_seconds,
        dtype=args.dtype,
        step=args.step,
        base=args.base,
        device=args.device,
        tensor=args.tensor,
    )


def add_commands(commands) -> None:
    parser = add_command(
        commands,
        "generate",
        generate,
        "Speak a text, or several at once: give --text, --out and, if need be, --adapter for each.",
    )
    parser.add_argument(
        "--model",
        type=as_path,
        required=True,
        help="a model's or a run's folder, a Hugging Face checkpoint's, or its hub id",
    )
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument(
        "--out", action="append", type=as_path, required=True, help="the wav to write"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        help="PEFT's or a LoRA run's folder, one for all texts or one each; '' is none",
    )
    add_codec(parser)
    add_device(parser)
    parser.add_argument("--speaker", type=LINE, default="", help="a speaker of the training data")
    parser.add_argument(
        "--description",
        type=LINE,
        default="",
        help="how to speak, where the model was trained with descriptions",
    )
    parser.add_argument(
        "--language", type=LINE, default="", help="where the model was trained with named languages"
    )
    parser.add_argument(
        "--prompt-audio", type=as_path, help="a voice to clone; needs --prompt-text"
    )
    parser.add_argument("--prompt-text", help="what the prompt audio says")
    parser.add_argument(
        "--temperature",
        type=number(float, low=0, high=1e3),
        default=0.8,
        help="0 always takes the most probable token",
    )
    parser.add_argument("--top-p", type=number(float, above=0, high=1), default=1.0)
    parser.add_argument(
        "--top-k", type=number(int, low=0, high=10**6), default=0, help="0 means all"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=number(float, above=0, high=100),
        default=1.0,
        help="1.2 is usual for finetuned voices",
    )
    parser.add_argument("--any-token", action="store_true", help="allow text tokens too")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument(
        "--max-seconds",
        type=number(float, low=0.02, high=3600),
        help="longest speech; by default a length that is plausible for the text",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--tensor",
        type=number(int, low=1, high=1024),
        default=1,
        help="devices that share the weights, for models larger than one device's memory",
    )
    add_step(parser)
    add_base(parser)
