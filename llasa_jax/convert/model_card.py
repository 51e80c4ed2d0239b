"""The README.md of an exported model: what it was made from and how, and how to make it speak."""

import json
import string
from pathlib import Path

import yaml

from llasa_jax.codec import DEFAULT_CODEC
from llasa_jax.runtime.files import read_yaml
from llasa_jax.runtime.storage import is_remote
from llasa_jax.speech.settings import PromptSettings
from llasa_jax.speech.vocab import SPEECH_GENERATION, TEXT_UNDERSTANDING

# A run's own files, as `llasa_jax.train.loop` and `llasa_jax.train.metrics` name them.
SETTINGS, METRICS = "settings.yaml", "metrics.jsonl"
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
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {repo.rsplit('/', 1)[-1]}",
        _summary(base, step, speaks),
        *_training(source, step),
        "## How to use it",
        *(_speaking(repo, prompt) if speaks and prompt.task == "tts" else _writing(repo)),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(base: str, step: int | None, speaks: bool) -> str:
    what = (
        "A text-to-speech model: Llasa, a LLaMA whose vocabulary holds the codes of XCodec2"
        if speaks
        else "A LLaMA language model"
    )
    link = f"[{base}](https://huggingface.co/{base})" if "/" in base else base
    how = (
        f"trained for {step} steps from {link}"
        if step is not None
        else f"the weights of {link}, unchanged"
    )
    return f"{what}; {how} with llasa-jax."


def _training(source: Path, step: int | None) -> list[str]:
    path = source / SETTINGS
    if step is None or not path.is_file():
        return []
    settings = read_yaml(path, "the run's settings")
    shown = _without_folders(
        {
            group: values
            for group, values in settings.items()
            if group not in ("out", "log", "prompt")
        }
    )
    data = shown.get("data", {})
    names = ", ".join(f"`{each.get('path', '')}`" for each in data.get("sources") or [data])
    parts = [
        "## Training",
        f"Data: {names}. All settings:",
        f"```yaml\n{yaml.safe_dump(shown, sort_keys=False)}```",
    ]
    numbers = ", ".join(
        f"{name.replace('_', ' ')} {number:.4g}"
        for name, number in _last_numbers(source / METRICS, step).items()
    )
    return [*parts, f"At the end: {numbers}"] if numbers else parts


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


def _speaking(repo: str, prompt: PromptSettings) -> list[str]:
    """The snippet builds the very prompt that training did. Its templates become f-strings, which
    have the same syntax.
    """
    templates = (prompt.system, prompt.user, prompt.assistant, prompt.assistant_with_speaker)
    fields = sorted(
        {
            name
            for template in templates
            for _, name, _, _ in string.Formatter().parse(template)
            if name
        }
        - FILLED
    )
    assistant, with_speaker = (
        template.partition("{codes}")[0] + "{codes}" for template in templates[2:]
    )
    roles = ([("system", f"f{prompt.system!r}")] if prompt.system else []) + [
        ("user", f"f{prompt.user!r}")
    ]
    roles += [("assistant", f"f{with_speaker!r} if speaker else f{assistant!r}")]
    messages = "".join(
        f'    {{"role": "{role}", "content": {content}}},\n' for role, content in roles
    )
    model = f"""```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto").eval()

text = "The quick brown fox jumps over the lazy dog."
speaker = ""  # a name, where the model was trained with named speakers
{"".join(f'{name} = ""{chr(10)}' for name in fields)}
text = f"{TEXT_UNDERSTANDING[0]}{{text}}{TEXT_UNDERSTANDING[1]}"
codes = "{SPEECH_GENERATION[0]}"
messages = [
{messages}]
prompt = tokenizer.apply_chat_template(
    messages,
    continue_final_message=True,
    date_string={prompt.date!r},
    return_tensors="pt",
    return_dict=True,
)
end = tokenizer.convert_tokens_to_ids("{SPEECH_GENERATION[1]}")
sampling = {{"do_sample": True, "temperature": 0.8, "top_p": 1.0}}
output = model.generate(**prompt, **sampling, max_length=2048, eos_token_id=end)
tokens = tokenizer.convert_ids_to_tokens(output[0, prompt["input_ids"].shape[1] :])
codes = [int(token[4:-2]) for token in tokens if token.startswith("<|s_")]
```"""
    codec = f"""```python
import soundfile
from transformers import Xcodec2Model

codec = Xcodec2Model.from_pretrained("{DEFAULT_CODEC}").eval()
with torch.no_grad():
    wave = codec.decode(torch.tensor(codes)[None, None]).audio_values
soundfile.write("speech.wav", wave.squeeze().numpy(), 16000)
```"""
    return ["Text to codes, 50 a second:", model, "Codes to sound:", codec]


def _writing(repo: str) -> list[str]:
    snippet = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto").eval()
prompt = tokenizer("The quick brown fox", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
```"""
    return [snippet]
