"""The command plan."""

from llasa_jax.cli.arguments import add_command, add_config, settings_of
from llasa_jax.errors import UserError
from llasa_jax.runtime.settings import number, text


def plan(args) -> None:
    import dataclasses
    import json

    import jax

    if args.topology != "here":
        jax.config.update("jax_platforms", "cpu")
    if args.encode:
        if args.config or args.settings:
            raise UserError("plan --encode takes neither --config nor settings; leave them out")
        _plan_encode(args)
        return
    if not args.config:
        raise UserError("plan needs a recipe, --config FILE, or --encode for a plan of encoding")
    from llasa_jax.plan import plan

    settings = settings_of(args)
    config = plan.model_geometry(args.model, settings)
    smallest = None
    if args.search:
        if args.topology != "here":
            smallest = plan.search_slice(settings, config, args.topology)
        result = plan.search_rows(settings, config, args.topology)
        result = result or plan.plan(settings, config, args.topology, 1)
    else:
        result = plan.plan(settings, config, args.topology, args.rows_per_device)
    tokens = plan.dataset_tokens(settings, args.speech_hours)
    if tokens:
        result = plan.with_dataset(result, settings, tokens)
    if args.json:
        found = {"smallest_slice": smallest and smallest.topology} if args.search else {}
        print(json.dumps(dataclasses.asdict(result) | found, indent=2))
        return
    print(plan.describe(result, settings))
    if args.search:
        print(
            f"the most rows per device that fit: {result.rows_per_device:g}"
            if result.fits
            else "not even one row per device fits"
        )
        if args.topology != "here":
            print(
                "the smallest machine of its kind that fits one row per device:"
                f" {smallest.topology if smallest else 'none that is known'}"
            )


def _plan_encode(args) -> None:
    import dataclasses
    import json

    from transformers import PreTrainedConfig, Xcodec2Config

    from llasa_jax.codec.xcodec2 import read_config
    from llasa_jax.plan import codec

    config = Xcodec2Config()
    if args.codec:
        config = read_config(args.codec, PreTrainedConfig.get_config_dict(args.codec)[0])
    hours = args.speech_hours or 1000.0
    plans = [
        codec.plan_codec(
            config, args.topology, part, hours, args.clips, args.seconds, args.precision
        )
        for part in args.part
    ]
    if args.json:
        print(json.dumps([dataclasses.asdict(plan) for plan in plans], indent=2))
    else:
        print("\n".join(codec.describe(plan, args.price) for plan in plans))


def add_commands(commands) -> None:
    parser = add_command(
        commands,
        "plan",
        plan,
        "Say whether a training step fits a machine that you may not have yet, and how long it"
        " takes there, or with --encode what encoding takes. Settings of `train` may follow as"
        " --setting.name=value.",
        takes_settings=True,
    )
    add_config(parser, required=False)
    parser.add_argument(
        "--topology",
        default="here",
        help="such as v5e:4x4, v5p:2x2x2, h100:8, or `here` for this machine",
    )
    parser.add_argument(
        "--model",
        type=text("1b, 3b, 8b or a model's folder"),
        help="1b, 3b, 8b or a model's folder, instead of model.path",
    )
    parser.add_argument(
        "--rows-per-device", type=number(int, low=1, high=65_536), help="instead of train.rows"
    )
    parser.add_argument(
        "--speech-hours",
        type=number(float, above=0, high=1e8),
        help="the dataset's size, where data.path is not there yet; with --encode 1,000",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="find the most rows per device and the smallest machine of its kind",
    )
    parser.add_argument("--json", action="store_true", help="print the plan for programs")

    encoding = parser.add_argument_group(
        "encoding", "With --encode: what the codec in JAX takes, and no --config is needed."
    )
    encoding.add_argument(
        "--encode",
        action="store_true",
        help="plan the encoding of a corpus: the memory of a batch, hours, device-hours and cost",
    )
    encoding.add_argument(
        "--codec", help="a folder in transformers' format; default: the published"
    )
    encoding.add_argument("--part", nargs="+", choices=("encoder", "decoder"), default=["encoder"])
    encoding.add_argument(
        "--clips", type=number(int, low=1, high=4096), default=16, help="at a time on a device"
    )
    encoding.add_argument(
        "--seconds", type=number(float, above=0, high=3600), default=10, help="of a clip"
    )
    encoding.add_argument(
        "--precision", choices=("float32", "bfloat16_3x", "bfloat16"), default="float32"
    )
    encoding.add_argument(
        "--price", type=number(float, low=0, high=1e6), default=0.0, help="of a device-hour"
    )
