"""Orbax on S3. Orbax 0.12 writes arrays to folders and to gs:// only: of another path its
TensorStore specs make a file of this machine, though TensorStore has a driver for S3.

There is no public way to give Orbax another spec, so four of its private names are set here: those
that say which paths are a store's, and what TensorStore calls them. With them a checkpoint on S3 is
what it is on gs://: written in place, and whole when its `commit_success.txt` is there.
"""

import os
from functools import cache
from typing import Any

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from llasa_jax.errors import UserError
from llasa_jax.runtime.storage import key_value_store

STORES = ("gs://", "s3://")
NAMES = (
    (gcs_utils, "_GCS_PATH_PREFIX"),
    (gcs_utils, "get_kvstore_for_gcs"),
    (tensorstore_utils, "_use_gcs_driver"),
    (tensorstore_utils, "_normalize_path"),
)


@cache
def let_orbax_use_s3() -> None:
    """Makes Orbax write to s3:// in this process. UserError where this version of Orbax has other
    names than those that are set.
    """
    if missing := [name for module, name in NAMES if not hasattr(module, name)]:
        raise UserError(
            f"this version of orbax-checkpoint cannot be made to write to s3:// (it has no"
            f" {missing[0]}); install orbax-checkpoint 0.12, or write to a folder or gs://"
        )
    of_gcs = gcs_utils.get_kvstore_for_gcs

    def spec(path: str) -> dict[str, Any]:
        if path.startswith("gs://"):
            return of_gcs(path)
        found = key_value_store(path)
        return found | {"path": found["path"].rstrip("/")}  # some paths are files

    def normalized(path: str) -> str:
        return os.path.normpath(path).replace("gs:/", "gs://").replace("s3:/", "s3://")

    gcs_utils._GCS_PATH_PREFIX = STORES
    gcs_utils.get_kvstore_for_gcs = spec
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(STORES)
    tensorstore_utils._normalize_path = normalized
