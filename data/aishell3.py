"""AISHELL-3 as a manifest: python data/aishell3.py AISHELL-3 > manifest.jsonl"""

import sys

from llasa_jax.data import corpora

if __name__ == "__main__":
    sys.exit(corpora.main(corpora.aishell3, __doc__))
