"""A Hugging Face checkpoint as a model of ours: python convert/hf_to_flax.py HF_FOLDER_OR_ID OUT"""

import sys

from llasa_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["import-hf", *sys.argv[1:]]))
