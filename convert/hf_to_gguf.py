"""An exported checkpoint as GGUF, for llama.cpp: python convert/hf_to_gguf.py HF_FOLDER OUT.gguf"""

import argparse
import sys
from pathlib import Path

from llasa_jax.convert.gguf_file import TYPES, write_gguf
from llasa_jax.errors import UserError, printable
from llasa_jax.runtime.files import sentence_of

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="the folder that export-hf wrote")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--type", choices=TYPES, default="bf16", help="of the matrices")
    arguments = parser.parse_args()
    try:
        write_gguf(arguments.source, arguments.out, arguments.type)
    except (UserError, OSError) as error:
        print(
            f"{parser.prog}: error: {printable(sentence_of(error, arguments.out))}", file=sys.stderr
        )
        sys.exit(2)
