import sys

from llasa_jax.demo import main

sys.exit(main())
