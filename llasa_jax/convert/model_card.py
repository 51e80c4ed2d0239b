"""The README.md of an exported model: what it was made from and how, and how to make it speak."""

import json
import string
from pathlib import Path
from typing import Any

import jinja2
import yaml

from llasa_jax.codec import DEFAULT_CODEC
from llasa_jax.runtime.files import read_yaml
from llasa_jax.runtime.storage import is_remote
from llasa_jax.speech.settings import PromptSettings
from llasa_jax.speech.vocab import SPEECH_GENERATION, TEXT_UNDERSTANDING

# A run's own files, as `llasa_jax.train.loop` and `llasa_jax.train.metrics` name them.
SETTINGS, METRICS = "settings.yaml", "metrics.jsonl"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
FILLED = {"text", "codes", "speaker"}  # by lines of their own in the snippet


def model_card(source: Path, origin: dict, repo: str, step: int | None, speaks: bool) -> str:
    """The card, in Markdown with YAML front matter.

    `source` is the model's or run's folder, `origin` its `source` from `model.json`, `repo` the
    name the model will have, `step` the run's step (None if it was not trained here), `speaks`
    whether its tokenizer has the speech tokens. Of paths only the last part is shown.
    """
    base = origin.get("base_model", "")
    front = {
        name: origin[name] for name in ("license", "license_name", "license_link") if name in origin
    }
    front |= {"base_model": base} if "/" in base else {}  # the hub takes only its own ids
    front |= {
        "library_name": origin.get("library_name", "transformers"),
        "pipeline_tag": "text-to-speech" if speaks else "text-generation",
    }
    front |= {"tags": ["llasa", "llasa-jax"] if speaks else ["llasa-jax"]}
    prompt = PromptSettings(**origin.get("prompt", {})).filled()
    values = _training(source, step) | (_snippet(prompt) if speaks and prompt.task == "tts" else {})
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        values, front=_yaml(front), repo=repo, base=base, step=step, speaks=speaks
    )


def _yaml(content: dict) -> str:
    return yaml.safe_dump(content, sort_keys=False)


def _training(source: Path, step: int | None) -> dict[str, str]:
    path = source / SETTINGS
    if step is None or not path.is_file():
        return {}
    settings = read_yaml(path, "the run's settings")
    private = "out", "log", "prompt"
    shown = {
        group: _without_folders(values)
        for group, values in settings.items()
        if group not in private
    }
    data = shown.get("data", {})
    numbers = _last_numbers(source / METRICS, step).items()
    return {
        "settings": _yaml(shown),
        "data": ", ".join(f"`{each.get('path', '')}`" for each in data.get("sources") or [data]),
        "numbers": ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers),
    }


def _without_folders(value):
    """The same settings with only the last part of every path: where things lie on this machine is
    nobody's business. Hub ids and prompts, which have slashes too, stay whole.
    """
    if isinstance(value, dict):
        return {name: _without_folders(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    return Path(value).name if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    if "/" not in text or "{" in text or len(text) > 1000:
        return False
    return is_remote(text) or text.startswith(("/", "~", "./", "../")) or Path(text).exists()


def _last_numbers(path: Path, step: int) -> dict[str, float]:
    """The losses and accuracies that were last written up to `step`."""
    last: dict[str, float] = {}
    text = path.read_bytes().decode(errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            numbers = json.loads(line)
        except ValueError:
            continue
        if numbers.get("step", step + 1) <= step:
            last |= {
                name: number
                for name, number in numbers.items()
                if name.endswith(("loss", "accuracy"))
            }
    return last


def _snippet(prompt: PromptSettings) -> dict[str, Any]:
    """For a snippet that builds the very prompt that training did. Its templates become f-strings,
    which have the same syntax.
    """
    templates = (prompt.system, prompt.user, prompt.assistant, prompt.assistant_with_speaker)
    parsed = [part for template in templates for part in string.Formatter().parse(template)]
    assistant, with_speaker = (
        template.partition("{codes}")[0] + "{codes}" for template in templates[2:]
    )
    return {
        "fields": sorted({name for _, name, _, _ in parsed if name} - FILLED),
        "messages": [
            *([("system", f"f{prompt.system!r}")] if prompt.system else []),
            ("user", f"f{prompt.user!r}"),
            ("assistant", f"f{with_speaker!r} if speaker else f{assistant!r}"),
        ],
        "date": repr(prompt.date),
        "codec": DEFAULT_CODEC,
        "text": TEXT_UNDERSTANDING,
        "speech": SPEECH_GENERATION,
    }
