"""The sharding table is the one place that names mesh axes: edited, the same training step runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from places import FIXTURES, ROOT
from reference import hf_llama

from llasa_jax.model import sharding

# Takes the place of the module, with an edited source, before anything imports it.
PROGRAM = """
import json, sys, types
from pathlib import Path
path, edits = Path(sys.argv[1]), json.loads(sys.argv[2])
source = path.read_text()
for old, new in edits:
    assert old in source, old
    source = source.replace(old, new)
module = types.ModuleType("llasa_jax.model.sharding")
sys.modules[module.__name__] = module
exec(compile(source, str(path), "exec"), module.__dict__)
import llasa_jax.model
llasa_jax.model.sharding = module
from reference import hf_llama
from twenty_steps import train
numbers, _ = train(hf_llama(), module.make_mesh(2, 2, 2), steps=2)
print(json.dumps([{name: float(value) for name, value in step.items()} for step in numbers]))
"""
RENAMED = [['"data"', '"copies"'], ['"fsdp"', '"shards"'], ['"tensor"', '"parts"']]
WHOLE_MLP = ['"F": "tensor"', '"F": None']
EDITS = {
    "every axis renamed, the MLP whole on every device": [WHOLE_MLP, *RENAMED],
    "the width whole on every device": [['"D": "fsdp"', '"D": None']],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit",
    [
        "every axis renamed, the MLP whole on every device",
        pytest.param("the width whole on every device", marks=pytest.mark.soak),
    ],
)
def test_the_table_can_be_edited(edit):
    from twenty_steps import train

    environment = os.environ | {"PYTHONPATH": f"{FIXTURES}:{ROOT}"}
    command = [sys.executable, "-c", PROGRAM, sharding.__file__, json.dumps(EDITS[edit])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, _ = train(hf_llama(), sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]), steps=2)
    for step, expected in zip(json.loads(done.stdout.splitlines()[-1]), alone, strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(step[name], value, rtol=2e-5, err_msg=name)


def test_no_other_module_of_the_model_names_an_axis():
    for path in Path(sharding.__file__).parent.glob("*.py"):
        if path.name not in ("sharding.py", "settings.py"):
            for axis in sharding.MESH_AXES:
                assert f'"{axis}"' not in path.read_text(), f"{path.name} names {axis}"
