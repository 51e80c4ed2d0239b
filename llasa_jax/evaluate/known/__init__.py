"""What scorers must know when they are loaded: three short recordings whose answers are known, and
the packages that are not there.

The recordings were made with flite's voices rms and slt (Carnegie Mellon University, free to use).
"""

import importlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from llasa_jax.errors import UserError
from llasa_jax.speech.audio import read_audio

DOOR = "Please close the door behind you."  # what rms_1 says
KEYS = "I left my keys on the table."  # what rms_2 and slt_2 say
_INSTALL = {
    "resemblyzer": "`pip install llasa-jax[evaluate]`, then `pip install --no-deps"
    " resemblyzer==0.1.4`",
    "funasr": "`pip install llasa-jax[paraformer]`",
}


def recording(name: str) -> np.ndarray:
    """The recording rms_1, rms_2 or slt_2, float32 (samples,) at 16 kHz."""
    return read_audio(Path(__file__).with_name(f"{name}.flac"))


def needed(module: str) -> Any:
    """The module of a package that only scorers need. UserError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what these packages import is partly deprecated
            return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        how = _INSTALL.get(package, "`pip install llasa-jax[evaluate]`")
        if error.name not in (None, package):
            raise UserError(
                f"the package {package} cannot be imported, it lacks {error.name}; run {how}"
            ) from None
        raise UserError(f"the package {package} is not installed; run {how}") from None
