"""Prepares a TFDS data set in ArrayRecord format: `python -m jax_transfer.data.prepare cifar10 [--data_dir DIR]`.

Preparing needs TensorFlow (`pip install "jax_transfer[prepare]"`); reading a prepared data set does not.
"""

import argparse
import os
import sys

import tensorflow_datasets as tfds

from jax_transfer.data import catalog
from jax_transfer.data.tfds_sets import unknown_tfds_name


def main(arguments: list[str] | None = None) -> int:
    """Prepares the data set and returns 0, or prints a one-line error and returns 2."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_transfer.data.prepare", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("name", help="a name in jax_transfer/data/catalog.py or at tensorflow.org/datasets")
    parser.add_argument("--data_dir", default=os.environ.get("TFDS_DATA_DIR"), help="default: $TFDS_DATA_DIR")
    options = parser.parse_args(arguments)
    entry = catalog.CATALOG.get(options.name)
    try:
        import tensorflow  # noqa: F401  imported here so that a missing TensorFlow gives a one-line error
    except ImportError:
        print('Preparing a data set needs TensorFlow: pip install "jax_transfer[prepare]"', file=sys.stderr)
        return 2
    try:
        tfds_name = entry.tfds if entry else options.name
        builder = tfds.builder(tfds_name, data_dir=options.data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        print(unknown_tfds_name(options.name), file=sys.stderr)
        return 2
    builder.download_and_prepare()
    print(f"{options.name} is prepared in {builder.data_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
