"""Upstream's numbers: ids, labels and loss as its offline dataset class and HF's LLaMA make them,
stated again here from its behaviour.

A memmap row is [TU_S text TU_E SG_S codes SG_E], cut to the row's length and padded with
<|eot_id|>. The chat template is tokenised with one TU_S and one SG_S in it, for which the row's two
halves are put in. Labels begin at SG_S; pads, and so every <|eot_id|>, carry none and are hidden
from attention. Everything is cut and padded to the row's length.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import config_of, hf_llama, our_llama, params_of

from llasa_jax.data.batching import BatchShape, Source, batches
from llasa_jax.model.loss import chunked_cross_entropy
from llasa_jax.speech.prompts import Prompter, Utterance
from llasa_jax.speech.settings import PromptSettings

LENGTH = 192


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    texts = ["Hello there.", "  the lazy dog ", "你好", "quick brown fox " * 5]
    # 150 codes and a long text do not fit: upstream cuts the end marker off.
    return [
        Utterance(text, rng.integers(0, 65_536, n).astype(np.uint16), f"clip{n}")
        for text, n in zip(texts, (1, 40, 95, 150), strict=True)
    ]


def upstream_item(tokenizer, text: str, codes, length: int) -> dict[str, torch.Tensor]:
    def id_of(token):
        return tokenizer.convert_tokens_to_ids(token)

    pad, start = id_of("<|eot_id|>"), id_of("<|SPEECH_GENERATION_START|>")
    text_ids = tokenizer.encode(
        f"<|TEXT_UNDERSTANDING_START|>{text}<|TEXT_UNDERSTANDING_END|>", add_special_tokens=False
    )
    codes_ids = [
        start,
        *(id_of("<|s_0|>") + int(code) for code in codes),
        id_of("<|SPEECH_GENERATION_END|>"),
    ]
    row = (text_ids + codes_ids)[:length]

    speech = row[row.index(start) :]
    chat = [
        {"role": "user", "content": "Convert the text to speech:<|TEXT_UNDERSTANDING_START|>"},
        {"role": "assistant", "content": "<|SPEECH_GENERATION_START|>"},
    ]
    ids = list(
        tokenizer.apply_chat_template(
            chat, tokenize=True, date_string="26 Jul 2024", return_dict=False
        )
    )
    for placeholder, piece in ((text_ids[0], row[: row.index(start)]), (start, speech)):
        at = ids.index(placeholder)
        ids[at : at + 1] = piece

    ids = torch.tensor((ids + [pad] * length)[:length])
    labels = torch.full_like(ids, -100)
    begin = int((ids == start).nonzero())
    labels[begin:] = ids[begin:]
    labels[ids == pad] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != pad).long()}


@pytest.fixture(scope="module")
def ours(tokenizer, clips):
    """The pipeline's one batch with packing off and upstream's settings, and each row's clip."""
    prompter = Prompter(tokenizer, PromptSettings(mask="upstream"))
    options = {"seed": 0, "repeat": False, "pack": False, "too_long": "cut"}
    (batch,) = batches([Source(clips, prompter)], BatchShape(1, len(clips), LENGTH), **options)
    return {name: array[0] for name, array in batch.items()}


def test_ids_and_labels_are_upstreams(tokenizer, clips, ours):
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    for row, clip in enumerate(clips):
        item = upstream_item(tokenizer, clip.text, clip.codes, LENGTH)
        visible = item["attention_mask"].bool().numpy()
        ids, labels = item["input_ids"].numpy(), item["labels"].numpy()
        # Ours pads with zeros, which like upstream's pads are seen by nothing.
        tokens = ours["tokens"][row]
        np.testing.assert_array_equal(tokens[tokens > 0], ids[: (tokens > 0).sum()])
        assert (ids[(tokens > 0).sum() :] == eot).all()
        np.testing.assert_array_equal(ours["segment_ids"][row] > 0, visible)
        # Ours are shifted by one in the data, upstream's in the model.
        np.testing.assert_array_equal(
            np.where(ours["loss_mask"][row], ours["targets"][row], -100)[:-1], labels[1:]
        )
    assert (
        tokenizer.convert_tokens_to_ids("<|SPEECH_GENERATION_END|>")
        in ours["targets"][0][ours["loss_mask"][0]]
    )
    assert tokenizer.convert_tokens_to_ids("<|SPEECH_GENERATION_END|>") not in ours["tokens"][-1]


def test_loss_is_that_of_hf_on_upstreams_items(tokenizer, clips, ours):
    """float32 on both sides; sums over 250 targets in another order."""
    hf = hf_llama(vocab=len(tokenizer), initializer_range=0.1)
    items = [upstream_item(tokenizer, clip.text, clip.codes, LENGTH) for clip in clips]
    with torch.no_grad():
        theirs = float(
            hf(**{name: torch.stack([item[name] for item in items]) for name in items[0]}).loss
        )
    model = our_llama(config_of(hf), params_of(hf))

    def loss(batch):
        hidden = model(
            *(jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids"))
        )
        nats, _ = chunked_cross_entropy(
            *model.output_factors(hidden),
            batch["targets"],
            batch["loss_mask"],
            vocab_size=len(tokenizer),
            chunk=LENGTH // 2,
        )
        return float(nats) / batch["loss_mask"].sum()

    assert loss(ours) == pytest.approx(theirs, rel=1e-5)
    # The clean mask is another model of the same clips: this test would notice.
    assert (
        abs(loss(ours | {"segment_ids": (ours["tokens"] > 0).astype(np.int32)}) / theirs - 1) > 1e-4
    )
