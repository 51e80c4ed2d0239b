"""A folder of recordings and texts as a manifest: python data/beside.py FOLDER > manifest.jsonl"""

import sys

from llasa_jax.data import corpora

if __name__ == "__main__":
    sys.exit(corpora.main(corpora.beside, __doc__))
