"""Measures the views of MoCo v2 on the device against torchvision on PIL images, on the same work in one run.

    python tests/benchmarks/augment.py [--size 224] [--images 128] [--repeat 5]

Both change colours, remove them, blur and mirror the same images with the same probabilities; cropping is not included.
torchvision works on one image after another in one thread, as a worker of its data loader does. Prints the median time
of an image, the cores used, and the ratio in images per second and core.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jax_transfer.data import augment
from jax_transfer.data.transforms import Preprocessing

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from helpers import torchvision_transforms

VIEW = ("jitter", "gray", "blur", "flip")


def median_seconds(run, repeat: int) -> float:
    """Returns the median time of a call, after one that is not timed."""
    run(0)
    times = []
    for i in range(repeat):
        start = time.perf_counter()
        run(i + 1)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    flags = parser.parse_args()
    small = np.random.default_rng(0).integers(0, 256, (flags.images, 8, 8, 3)).astype(np.uint8)
    pixels = [np.asarray(Image.fromarray(x).resize((flags.size, flags.size), Image.Resampling.BICUBIC)) for x in small]
    images, preprocessing = jnp.asarray(np.stack(pixels)), Preprocessing(image_size=flags.size)

    @jax.jit
    def view(key, images):
        images = images.astype(jnp.float32) / 255
        for i, name in enumerate(VIEW):
            images = augment.AUGMENTATIONS[name](jax.random.fold_in(key, i), images, preprocessing)
        return images

    ours = median_seconds(lambda i: view(jax.random.key(i), images).block_until_ready(), flags.repeat) / flags.images
    cores = os.cpu_count() if jax.default_backend() == "cpu" else 0
    device = f"{cores} CPU cores" if cores else str(jax.devices()[0])
    print(f"jax_transfer: {1e3 * ours:.2f} ms an image on {device}")

    transforms = torchvision_transforms.load()
    if transforms is None:
        sys.exit("torchvision is not installed: nothing to compare with")
    from PIL import ImageFilter

    def blurred(image):
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))

    reference = transforms.Compose(
        [
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([blurred], p=0.5),
            transforms.RandomHorizontalFlip(),
        ]
    )
    files = [Image.fromarray(x) for x in pixels]
    theirs = median_seconds(lambda i: [reference(image) for image in files], flags.repeat) / flags.images
    print(f"torchvision with PIL: {1e3 * theirs:.2f} ms an image on one core")
    if cores:
        print(f"images per second and core, jax_transfer / torchvision: {theirs / (ours * cores):.2f}")


if __name__ == "__main__":
    main()
