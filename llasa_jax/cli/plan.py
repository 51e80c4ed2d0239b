"""The command plan."""

from llasa_jax.cli.arguments import add_command, add_config, settings_of
from llasa_jax.runtime.settings import number, text


def plan(args) -> None:
    import dataclasses
    import json

    import jax

    if args.topology != "here":
        jax.config.update("jax_platforms", "cpu")
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


def plan_codec(args) -> None:
    import dataclasses
    import json

    import jax
    from transformers import PreTrainedConfig, Xcodec2Config

    if args.topology != "here":
        jax.config.update("jax_platforms", "cpu")
    from llasa_jax.codec.xcodec2 import read_config
    from llasa_jax.plan import codec

    config = Xcodec2Config()
    if args.codec:
        config = read_config(args.codec, PreTrainedConfig.get_config_dict(args.codec)[0])
    plans = [
        codec.plan_codec(
            config, args.topology, part, args.hours, args.clips, args.seconds, args.precision
        )
        for part in args.part
    ]
    if args.json:
        print(json.dumps([dataclasses.asdict(plan) for plan in plans], indent=2))
    else:
        print("\n".join(map(codec.describe, plans)))


def add_commands(commands) -> None:
    parser = add_command(
        commands,
        "plan",
        plan,
        "Say whether a training step fits a machine that you may not have yet, and how long it"
        " takes there. Settings of `train` may follow as --setting.name=value.",
        takes_settings=True,
    )
    add_config(parser)
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
        help="the dataset's size, where data.path is not there yet",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="find the most rows per device and the smallest machine of its kind",
    )
    parser.add_argument("--json", action="store_true", help="print the plan for programs")

    parser = add_command(
        commands,
        "plan-codec",
        plan_codec,
        "Say what the codec in JAX takes on a machine that you may not have yet: the memory of a"
        " batch, and the hours of encoding a corpus.",
    )
    parser.add_argument(
        "--topology", default="here", help="such as v5e:4x4, or `here` for this machine"
    )
    parser.add_argument("--codec", help="a folder in transformers' format; default: the published")
    parser.add_argument(
        "--part", nargs="+", choices=("encoder", "decoder"), default=["encoder", "decoder"]
    )
    parser.add_argument(
        "--hours", type=number(float, above=0, high=1e8), default=1000, help="of speech"
    )
    parser.add_argument(
        "--clips", type=number(int, low=1, high=4096), default=16, help="at a time on a device"
    )
    parser.add_argument(
        "--seconds", type=number(float, above=0, high=3600), default=10, help="of a clip"
    )
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16_3x", "bfloat16"), default="float32"
    )
    parser.add_argument("--json", action="store_true", help="print the plan for programs")
