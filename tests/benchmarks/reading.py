"""Compares the reading of training images (images per second and core) with torchvision on PIL, and Grain with OpenCV.

python tests/benchmarks/reading.py PHOTOS [--images 640] [--repeats 5] [--out FILE.json]

Each side decodes JPEG files of the folder PHOTOS and cuts a random window of 8 % to 100 % of the area from the full
image, at 224 pixels; mirroring and normalisation are left out. Ours is the project's streamed feed up to the transfer
to a device. torchvision's `RandomResizedCrop` runs on PIL images in one process per core, as in a DataLoader. Grain
with OpenCV resizes with `cv2.resize`, which does not antialias. "Grey levels" is the largest difference from
torchvision for the same boxes. The sides alternate, on one core and on all of them, and medians are compared. Without
torchvision, the PIL calls of its transform are used.

It then prints how many cores a machine needs to feed ResNet-50 at assumed training rates (--rates). They are round
figures in the range of published results with mixed precision, not measurements: 3,000 images/s for an H100, and 1,000
for a v4 chip.
"""

import argparse
import concurrent.futures
import functools
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

import cv2
import grain
import numpy as np
import PIL
from PIL import Image

from helpers import torchvision_transforms
from jax_transfer import devices
from jax_transfer.data import crops
from jax_transfer.data.batches import Streamed, _Rows
from jax_transfer.data.source import Source
from jax_transfer.data.transforms import Preprocessing, decode_file

TRANSFORMS = torchvision_transforms.load()
SIZE, BATCH = 224, 32
CROP = crops.CROPS["resized_crop"]


# --- the sides: functions from (paths, number of cores) to the seconds of one pass


def ours(paths: list[str], cores: int) -> float:
    """The streamed feed, up to the transfer to a device."""

    def read(indices):
        return [decode_file(paths[int(i)]) for i in indices]

    labels = np.zeros(len(paths), np.int32)
    source = Source("photos", "train", ("photo",), labels, read, "")
    feed = Streamed(source, Preprocessing(SIZE, 0.875), devices.make_mesh(), cores, (CROP,))
    order = np.arange(len(paths)).reshape(-1, BATCH)
    rows = _Rows(order, feed.mesh, num_windows=1)
    return _seconds(grain.MapDataset.source(rows).map(feed._read), cores)


def grain_opencv(paths: list[str], cores: int) -> float:
    """Grain's usual pipeline: a record is one image, decoded, cut and resized with OpenCV, then batched."""

    def cut(i):
        return cv2_window(read_bgr(paths[i]), i)

    return _seconds(grain.MapDataset.range(len(paths)).map(cut).batch(BATCH), cores)


def torchvision(paths: list[str], cores: int) -> float:
    """RandomResizedCrop on PIL images, in one process per core."""
    chunks = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]
    if cores == 1:
        start = time.perf_counter()
        for chunk in chunks:
            pil_batch(chunk)
        return time.perf_counter() - start
    pool = _pool(cores)
    start = time.perf_counter()
    for _ in pool.map(pil_batch, chunks):
        pass
    return time.perf_counter() - start


@functools.cache
def _pool(cores: int):
    pool = concurrent.futures.ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"))
    list(pool.map(time.sleep, [1.0] * cores))  # starts the processes
    return pool


def _seconds(dataset, cores: int) -> float:
    batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=cores, prefetch_buffer_size=2 * cores))
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def pil_batch(paths: list[str]) -> np.ndarray:
    images = np.empty((len(paths), SIZE, SIZE, 3), np.uint8)
    for i, path in enumerate(paths):
        with Image.open(path) as image:
            image = image.convert("RGB")
        images[i] = np.asarray(pil_crop(image))
    return images


def pil_crop(image: Image.Image) -> Image.Image:
    if TRANSFORMS is not None:
        return TRANSFORMS.RandomResizedCrop(SIZE)(image)
    rng = np.random.randint(2**31)
    return pil_window(image, box_of((image.height, image.width), rng))


def pil_window(image: Image.Image, box) -> Image.Image:
    """The calls of torchvision's `resized_crop` of a PIL image."""
    top, left, height, width = (int(x) for x in box)
    cut = image.crop((left, top, left + width, top + height))
    return cut.resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def box_of(sides, number: int):
    height, width = (np.array([side]) for side in sides)
    return crops.boxes(CROP, crops.draws(0, number, 1), height, width)[0]


def read_bgr(path: str) -> np.ndarray:
    return cv2.imread(path, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def cv2_window(image: np.ndarray, number: int) -> np.ndarray:
    top, left, height, width = box_of(image.shape[:2], number)
    return cv2.resize(image[top : top + height, left : left + width], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)


SIDES = {"ours": ours, "torchvision, PIL": torchvision, "Grain, OpenCV": grain_opencv}


# --- what they compute, and where the time goes


def differences(paths: list[str]) -> dict[str, int]:
    """Returns the largest difference of each side's windows from those of torchvision for the same boxes."""
    found = {"ours": 0, "torchvision, PIL": 0, "Grain, OpenCV": 0}
    for number, path in enumerate(paths):
        image = decode_file(path)
        box = box_of(image.shape[:2], number)
        with Image.open(path) as file:
            expected = np.asarray(pil_window(file.convert("RGB"), box)).astype(int)
        ours_and_cv2 = {
            "ours": crops.window(image, box, SIZE, "bilinear"),
            "Grain, OpenCV": cv2_window(read_bgr(path), number),
        }
        for name, window in ours_and_cv2.items():
            found[name] = max(found[name], int(np.abs(window - expected).max()))
    return found


def profile(paths: list[str]) -> dict[str, float]:
    """Returns the milliseconds per image of the parts of our side, on one core."""
    parts = {
        "read the file": lambda i: pathlib.Path(paths[i]).read_bytes(),
        "read and decode": lambda i: decode_file(paths[i]),
        "draw and place the box": lambda i: box_of(images[i].shape[:2], i),
        "cut and resize": lambda i: crops.window(images[i], boxes[i], SIZE, "bilinear"),
        "OpenCV: decode the bytes": lambda i: cv2.imdecode(data[i], cv2.IMREAD_COLOR_RGB),
    }
    images = [decode_file(path) for path in paths]
    data = [np.fromfile(path, np.uint8) for path in paths]
    boxes = [box_of(image.shape[:2], i) for i, image in enumerate(images)]
    result = {}
    for name, part in parts.items():
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            for i in range(len(paths)):
                part(i)
            seconds.append(time.perf_counter() - start)
        result[name] = round(1e3 * statistics.median(seconds) / len(paths), 3)
    return result


def measure(paths: list[str], cores: list[int], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each pass of each side on these cores; the sides alternate."""
    os.sched_setaffinity(0, cores)
    seconds = {name: [] for name in SIDES}
    for repeat in range(repeats + 1):
        for name, run in SIDES.items():
            value = run(paths, len(cores))
            if repeat:  # the first pass fills the cache of files and starts processes
                seconds[name].append(value)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=pathlib.Path, help="folder of JPEG files")
    parser.add_argument("--images", type=int, default=640, help="images in a pass, a multiple of 32 (default: 640)")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each side (default: 5)")
    parser.add_argument("--cores", type=int, help="largest number of cores (default: all)")
    parser.add_argument(
        "--rates",
        type=json.loads,
        default={"H100": 3000, "v4 host, 4 chips": 4000},
        help='assumed training rates in images/s as JSON (default: {"H100": 3000, "v4 host, 4 chips": 4000})',
    )
    parser.add_argument("--out", type=pathlib.Path, help="write the result as JSON")
    flags = parser.parse_args()
    files = [str(path) for path in sorted(flags.photos.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg")]
    paths = (files * (flags.images // len(files) + 1))[: flags.images // BATCH * BATCH]
    cv2.setNumThreads(1)
    available = sorted(os.sched_getaffinity(0))[: flags.cores]
    head = {
        "images": len(paths),
        "files": len(files),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "pillow": PIL.__version__,
        "opencv": cv2.__version__,
        "grain": grain.__version__,
        "torchvision": importlib.metadata.version("torchvision") if TRANSFORMS else "PIL calls of its transform",
    }
    print(json.dumps(head), flush=True)
    os.sched_setaffinity(0, available[:1])
    result = {
        **head,
        "difference_from_torchvision": differences(files),
        "ours_ms_per_image": profile(files),
        "rows": [],
    }
    for count in dict.fromkeys((1, len(available))):
        seconds = measure(paths, available[:count], flags.repeats)
        for name, values in seconds.items():
            rate = len(paths) / statistics.median(values)
            row = {
                "what": name,
                "cores": count,
                "images_per_second": round(rate, 1),
                "images_per_second_and_core": round(rate / count, 1),
                "ratio_ours": round(statistics.median(values) / statistics.median(seconds["ours"]), 3),
                "all_seconds": [round(value, 3) for value in values],
            }
            result["rows"].append(row)
            print(
                f"{count} core(s)  {name:17} {row['images_per_second']:8.1f} images/s, "
                f"{row['images_per_second_and_core']:7.1f} a core; ours is {row['ratio_ours']:.2f} times as fast; "
                f"up to {result['difference_from_torchvision'][name]} grey levels",
                flush=True,
            )
    per_core = min(row["images_per_second_and_core"] for row in result["rows"] if row["what"] == "ours")
    result["cores_needed_at_assumed_rates"] = {
        name: {"images_per_second": rate, "cores": round(rate / per_core, 1)} for name, rate in flags.rates.items()
    }
    for name, needs in result["cores_needed_at_assumed_rates"].items():
        print(f"{name}, assumed {needs['images_per_second']:,} images/s: {needs['cores']} cores", flush=True)
    print(json.dumps(result["ours_ms_per_image"]))
    if flags.out:
        flags.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
