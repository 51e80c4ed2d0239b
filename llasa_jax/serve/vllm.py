"""Speech from a vLLM server that has an exported checkpoint: our prompts, its tokens, our codec.

    vllm serve release/llasa-1b
    python -m llasa_jax.serve.vllm --model runs/llasa-1b --name release/llasa-1b \\
        --text "Hello there." --out hello.wav

The prompts are the run's. The server is sent the ids of the prompt, and the codes are read from the
text that it answers with (`<|s_17|><|s_4|>...`), which every version of its completions API gives.
"""

import argparse
import json
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llasa_jax.codec import DEFAULT_CODEC, load_codec
from llasa_jax.convert.model_folder import load_tokenizer, read_description
from llasa_jax.errors import UserError, first_line
from llasa_jax.generate.decode import plausible_limit
from llasa_jax.generate.settings import SamplingSettings
from llasa_jax.generate.sound import trim_tail
from llasa_jax.runtime.storage import as_path
from llasa_jax.speech.audio import write_audio
from llasa_jax.speech.prompts import Prompter
from llasa_jax.speech.settings import PromptSettings

TAIL_SECONDS = 0.5


@dataclass(frozen=True)
class Server:
    """A vLLM server: `url`, such as http://127.0.0.1:8000, and `name`, that of the model there."""

    url: str
    name: str
    timeout: float = 600.0

    def codes(
        self, prompter: Prompter, text: str, sampling: SamplingSettings, speaker: str = ""
    ) -> np.ndarray:
        """What the server says of a text: codes, uint16, 50 a second. UserError where it cannot be
        reached, refuses the request, or says nothing.
        """
        vocab = prompter.vocab
        answer = self._ask(
            {
                "model": self.name,
                "prompt": prompter.opening(text, speaker=speaker).tolist(),
                "max_tokens": plausible_limit(text),
                "min_tokens": 2,
                "stop_token_ids": [vocab.speech_end],
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or -1,
                "repetition_penalty": sampling.repetition_penalty,
                "seed": sampling.seed,
                # The codes are added tokens, which vLLM would leave out of the text or set apart.
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
            }
        )
        codes = [int(code) for code in re.findall(r"<\|s_(\d{1,5})\|>", answer)]
        if not codes:
            raise UserError(
                f"{self.url} said no speech tokens, but {answer[:80]!r}; serve the folder that"
                " export-hf wrote"
            )
        return np.array(codes, np.uint16)

    def _ask(self, body: dict) -> str:
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.load(answer)["choices"][0]["text"]
        except urllib.error.HTTPError as error:
            reason = error.read(500).decode(errors="replace")
            raise UserError(
                f"{self.url} refused the request ({reason}); check the model's name"
            ) from None
        except (OSError, ValueError, LookupError) as error:
            raise UserError(
                f"{self.url} gave no answer of vLLM's ({first_line(error)}); start `vllm serve`, or"
                " correct the address"
            ) from None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speak a text with a vLLM server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument(
        "--model",
        type=as_path,
        required=True,
        help="the run, for its prompts; an exported folder has the default ones",
    )
    parser.add_argument("--name", help="of the model at the server; --model by default")
    parser.add_argument("--codec", default=DEFAULT_CODEC)
    parser.add_argument("--device", default="cpu", help="of the codec")
    parser.add_argument("--text", required=True)
    parser.add_argument("--speaker", default="", help="a speaker of the training data")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    sampling = SamplingSettings(
        args.temperature, repetition_penalty=args.repetition_penalty, seed=args.seed
    )
    _, origin = read_description(args.model)
    prompts = PromptSettings(**origin.get("prompt", {}))
    prompter = Prompter(load_tokenizer(args.model), prompts)
    server = Server(args.url.rstrip("/"), args.name or str(args.model))
    codes = server.codes(prompter, args.text, sampling, args.speaker)
    codec = load_codec(args.codec, args.device)
    write_audio(args.out, trim_tail(codec.decode(codes), TAIL_SECONDS, codec.sample_rate))
    print(f"{args.out}: {len(codes)} codes")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
