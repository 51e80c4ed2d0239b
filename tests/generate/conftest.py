"""A tiny model in transformers and in JAX, a run that holds it, and a codec."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import config_of, params_of
from tiny_speech import GREEDY, TEXTS, graph_of

from llasa_jax.convert.model_folder import CHECKPOINTS, HF_FOLDER, save_params, write_description
from llasa_jax.demo.tiny import make_tiny_codec
from llasa_jax.demo.tiny_llama import make_tiny_llama
from llasa_jax.generate.decode import generate_codes
from llasa_jax.speech.prompts import Prompter
from llasa_jax.speech.settings import PromptSettings


@pytest.fixture(scope="session")
def prompts(prompter):
    return [prompter.opening(text) for text in TEXTS]


@pytest.fixture(scope="session")
def hf_models(tokenizer, tmp_path_factory):
    """Tied and untied, with weights so large that earlier tokens decide the next one."""
    import torch
    from transformers import LlamaForCausalLM

    # Others may be using the cores, and threads that wait for each other make a tiny model slow.
    threads, models = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    for tied in (True, False):
        folder = tmp_path_factory.mktemp("hf")
        make_tiny_llama(folder, tokenizer, tie_word_embeddings=tied, initializer_range=0.4)
        models[tied] = LlamaForCausalLM.from_pretrained(folder).eval()
    yield models
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ours(hf_models):
    return {
        tied: (graph_of(config_of(hf)), jax.tree.map(jnp.asarray, params_of(hf)))
        for tied, hf in hf_models.items()
    }


@pytest.fixture(scope="session")
def model(ours):
    return ours[False]


def ending_head(graphdef, params, prompt, vocab) -> tuple[np.ndarray, int]:
    """An output table with which greedy speech of `prompt` ends by itself, and after how many
    codes.

    The end marker's row points along one of the hidden states on the way, and is just long enough
    to win there.
    """
    (said,) = generate_codes(graphdef, params, [prompt], vocab, 40, GREEDY)
    tokens = jnp.asarray(np.concatenate([prompt, said.tokens]))[None]
    net = nnx.merge(graphdef, params)
    hidden = np.asarray(net(tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)))[
        0, len(prompt) - 1 : -1
    ]
    best = (hidden @ np.asarray(params["head"])[vocab.code_base : vocab.code_base + 65536].T).max(
        -1
    )
    along = hidden @ hidden.T
    for at in range(5, len(hidden)):
        needed, before = best[at] / along[at, at], best[:at] / np.maximum(along[at, :at], 1e-6)
        if needed < 0.9 * before.min():
            head = np.array(params["head"])
            head[vocab.speech_end] = hidden[at] * (needed + before.min()) / 2
            return head, at
    raise AssertionError("no state stands out; take another seed")


@pytest.fixture(scope="session")
def folder(hf_models, model, tokenizer, prompter, tmp_path_factory):
    """A run, trained with other prompts than the default. Its last step ends `TEXTS[0]` by itself,
    its first hardly ever ends.
    """
    graphdef, params = model
    folder = tmp_path_factory.mktemp("run")
    settings = PromptSettings(date="", user="Say:{text}")
    head, codes = ending_head(
        graphdef, params, Prompter(tokenizer, settings).opening(TEXTS[0]), prompter.vocab
    )
    write_description(
        folder,
        config_of(hf_models[False]),
        {"base_model": "tiny", "prompt": dataclasses.asdict(settings)},
    )
    tokenizer.save_pretrained(folder / HF_FOLDER)
    save_params(folder / CHECKPOINTS / "1", params)
    save_params(folder / CHECKPOINTS / "2", params | {"head": jnp.asarray(head)})
    (folder / "ends_after").write_text(str(codes))
    return folder


@pytest.fixture(scope="session")
def codec(tmp_path_factory):
    return make_tiny_codec(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="session")
def recording(tmp_path_factory):
    from llasa_jax.speech.audio import write_audio

    path = tmp_path_factory.mktemp("audio") / "voice.wav"
    write_audio(path, np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32))
    return path
