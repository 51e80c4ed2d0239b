"""Speech by vLLM's completions API: a server that answers as vLLM does, with transformers."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile
import torch
from scripted_voice import ShowingCodec
from transformers import LlamaForCausalLM

from llasa_jax.demo.tiny_llama import make_tiny_llama
from llasa_jax.errors import UserError
from llasa_jax.generate.sampling import SamplingSettings
from llasa_jax.generate.settings import SpeechSettings
from llasa_jax.generate.speaker import Speaker
from llasa_jax.serve import vllm

pytestmark = pytest.mark.slow
TEXT, GREEDY = "dog", SamplingSettings(temperature=0)
# Each a parameter of vLLM's completions API.
KNOWN = {
    *("model", "prompt", "max_tokens", "min_tokens", "stop_token_ids", "temperature", "top_p"),
    *("top_k", "repetition_penalty", "seed", "skip_special_tokens"),
    "spaces_between_special_tokens",
}


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    make_tiny_llama(folder, tokenizer, num_hidden_layers=1, initializer_range=0.4)
    return folder


@pytest.fixture(scope="module")
def url(folder, tokenizer):
    model = LlamaForCausalLM.from_pretrained(folder).eval()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path != "/v1/completions" or body.keys() - KNOWN or body["model"] != "voice":
                self.send_error(404, "unknown model")
                return
            prompt = torch.tensor([body["prompt"]])
            banned = [[token] for token in range(len(tokenizer)) if token < first_code]
            new = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=min(12, body["max_tokens"]),
                bad_words_ids=banned,
                eos_token_id=body["stop_token_ids"],
                pad_token_id=0,
            )[0, prompt.shape[1] :]
            text = tokenizer.decode(
                new,
                skip_special_tokens=body["skip_special_tokens"],
                spaces_between_special_tokens=body["spaces_between_special_tokens"],
            )
            answer = json.dumps({"choices": [{"text": text, "index": 0}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    first_code = tokenizer.convert_tokens_to_ids("<|s_0|>")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_greedy_codes_are_those_of_a_speaker(folder, url, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm, "load_codec", lambda name, device: ShowingCodec())
    monkeypatch.setattr("llasa_jax.generate.speaker.load_codec", lambda *_: ShowingCodec())
    speaker = Speaker.load(folder, dtype="float32", rows=1)
    settings = SpeechSettings(max_seconds=0.24, loop_seconds=0, fastest=1)
    ((_, said),) = speaker.say([TEXT], GREEDY, settings)
    out = tmp_path / "out.wav"
    options = [f"--model={folder}", f"--text={TEXT}", f"--out={out}", "--temperature=0"]
    vllm.main([*options, f"--url={url}", "--name=voice"])
    assert len(said.codes) == 12
    wave, _ = soundfile.read(out)
    np.testing.assert_allclose(wave, ShowingCodec().decode(said.codes), atol=1 / 32_000)


def test_what_is_no_server_is_said_in_a_sentence(url, prompter):
    with pytest.raises(UserError, match="refused the request"):
        vllm.Server(url, "other").codes(prompter, TEXT, GREEDY)
    with pytest.raises(UserError, match="vllm serve"):
        vllm.Server("http://127.0.0.1:9", "voice").codes(prompter, TEXT, GREEDY)
