"""Folders of images."""

import numpy as np
from PIL import Image


def write_images(folder, count, seed=0, size=(12, 10)):
    """`count` different images in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng([seed, *folder.name.encode()])
    for i in range(count):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
