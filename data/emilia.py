"""Emilia's WebDataset as a manifest: python data/emilia.py Emilia/EN > manifest.jsonl"""

import sys

from llasa_jax.data import corpora

if __name__ == "__main__":
    sys.exit(corpora.main(corpora.emilia, __doc__))
