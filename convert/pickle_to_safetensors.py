"""A checkpoint of torch.save (.bin, .pt, .pth) as safetensors: python
convert/pickle_to_safetensors.py FILE_OR_FOLDER OUT

Reads tensors only, so no code in the file can run. OUT is a new folder.
"""

import argparse
import sys
from pathlib import Path

from llasa_jax.convert.pickles import pickle_to_safetensors
from llasa_jax.errors import UserError, printable
from llasa_jax.runtime.files import sentence_of

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a file, or the folder of a checkpoint")
    parser.add_argument("destination", type=Path, help="a new folder")
    arguments = parser.parse_args()
    try:
        pickle_to_safetensors(arguments.source, arguments.destination)
    except (UserError, OSError) as error:
        print(f"{parser.prog}: error: {printable(sentence_of(error))}", file=sys.stderr)
        sys.exit(2)
