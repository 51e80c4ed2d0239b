"""Numbers of a few training steps, committed: a change that is not meant to change arithmetic must
not move them.
"""

import numpy as np
from tiny_run import lines_of, make_clips, make_model, settings_for

from llasa_jax.train.loop import train

# loss (nats a target), gradient norm and targets of each step: six steps of AdamW in float32 on the
# CPU, a learning rate of 1e-2 with warm-up and cosine, packed clips, 8 devices (2 x 2 x 2).
GOLDEN = {
    1: [11.065284729, 1.1407215595, 65.0],
    2: [11.104407310, 1.0978738070, 74.0],
    3: [11.052042961, 1.2101141214, 71.0],
    4: [10.652173042, 1.6722186804, 60.0],
    5: [10.510101318, 1.7762553692, 73.0],
    6: [10.408576965, 1.2635498047, 77.0],
}

MEANING = """
The numbers of training have changed. They follow from the tokenizer, the prompt, the order of the
data, packing, the model, the loss and the optimizer. If the change meant none of these, it has a
bug: find the step where the numbers part (the first step is the forward pass and the gradient, the
second the optimizer). If it meant one of them, put the new numbers into GOLDEN, in a commit that
says why they moved and by how much:

GOLDEN = {new}
"""


def test_the_numbers_of_six_steps(tmp_path):
    model = make_model(tmp_path / "model")
    run = train(settings_for(model, tmp_path / "run"), [make_clips()])
    found = {
        line["step"]: [line["loss"], line["grad_norm"], line["targets"]]
        for line in lines_of(run)
        if "loss" in line
    }
    same = found.keys() == GOLDEN.keys() and all(
        # Another processor sums in another order; nothing else may differ.
        np.allclose(found[step], GOLDEN[step], rtol=2e-5)
        for step in found
    )
    assert same, MEANING.format(new=found)
