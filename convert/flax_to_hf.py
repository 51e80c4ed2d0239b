"""A model or a run as a Hugging Face checkpoint: python convert/flax_to_hf.py RUN OUT"""

import sys

from llasa_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["export-hf", *sys.argv[1:]]))
