"""Compares training speed (images per second) with torch in the same run, for repeated steps and an epoch of CIFAR-10.

python tests/benchmarks/train_step.py [--what step18,step50,epoch] [--batch 128] [--repeats 5] [--out FILE.json]

Both sides train the same network (torch's is in tests/helpers/torch_twins.py) with the same batch size, augmentation
(pad_crop, flip) and optimizer (SGD, momentum 0.9, weight decay 5e-4). Our side uses the project's feed, step and loop.
The torch side is the fastest variant of `TORCH_VARIANTS`, with data and augmentation on the device like ours, or with a
DataLoader if ours streams. The first calls, which compile, are timed separately; then both sides alternate, and medians
are compared. If our side is slower, its profile is recorded. On a CPU, sizes are smaller and training runs in float32;
on a GPU, it runs in bfloat16. TFLOP/s is the compiler's count of operations per step times the measured rate. Needs
torch.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import re
import statistics
import sys
import tempfile
import time

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch needs its share of the GPU's memory
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

from helpers import torch_twins
from jax_transfer import devices
from jax_transfer.data.batches import joined, make_feed
from jax_transfer.data.sources import Source, from_arrays, load_source
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import MODELS
from jax_transfer.training.loop import train
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import init_state
from jax_transfer.training.steps import make_train_step, many_steps, train_step_gigaflops

LEARNING_RATE = 0.05
GRAIN_THREADS = 16  # the default of config.data.num_threads


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    block: str
    stages: tuple[int, ...]
    stem: str
    size: int
    num_classes: int


RESNET18 = Case("resnet18", "BasicBlock", (2, 2, 2, 2), "cifar", 32, 10)
RESNET50 = Case("resnet50", "Bottleneck", (3, 4, 6, 3), "imagenet", 224, 1000)

# device -> benchmark -> (batch sizes, steps per timed run; None is an epoch)
SIZES = {
    "cpu": {"step18": ((64,), 2), "step50": ((8,), 2), "epoch": ((64,), None)},
    "gpu": {"step18": ((128, 256, 512), 50), "step50": ((64, 256), 20), "epoch": ((128, 256, 512), None)},
}
CPU_EPOCH_IMAGES = 2000

# device -> variant -> (channels last, mode of torch.compile or None for eager)
TORCH_VARIANTS = {
    "cpu": {"eager": (False, None), "channels_last": (True, None), "compiled": (True, "default")},
    "gpu": {"eager": (True, None), "compiled": (True, "default"), "cuda graphs": (True, "reduce-overhead")},
}


def our_training(case: Case, source: Source, batch: int, resident: bool):
    """Returns run(limit), which trains an epoch or its first `limit` steps, and the GFLOP of a step.

    Compiled calls of more steps than `limit` run completely.
    """
    preprocessing, mesh = Preprocessing(image_size=case.size), devices.make_mesh()
    feed = make_feed(source, preprocessing, mesh, 1e3 if resident else 0.0, GRAIN_THREADS)
    net = MODELS[case.model](num_classes=case.num_classes, stem=case.stem, dtype=devices.compute_dtype())
    steps = len(source) // batch
    optimizer = make_optimizer(OptimizerSettings(learning_rate=LEARNING_RATE, weight_decay=5e-4), steps)
    objective, joint = OBJECTIVES["supervised"](net, ("pad_crop", "flip")), joined({"train": (feed, batch)})
    step = make_train_step(objective, optimizer, preprocessing, joint.num_classes)
    compiled = many_steps(step, joint.fetch, mesh)
    state = devices.replicate(init_state(objective, optimizer, 0), mesh)
    gigaflops = train_step_gigaflops(step, state, joint.sizes, objective.views, preprocessing)

    def run(limit: int | None = None):
        nonlocal state
        state["step"] = devices.replicate(jnp.zeros((), jnp.int32), mesh)
        for epoch in train(state, compiled, joint, seed=0, total_steps=min(limit or steps, steps), what="ours"):
            state = epoch.state
        jax.block_until_ready(state)

    return run, gigaflops


def torch_view(images, size, mean, std, channels_last):
    """Pads, crops, flips and normalises uint8 [b, size, size, 3] to float32 [b, 3, size, size], in one gather."""
    b, pad, pixels = len(images), size // 8, torch.arange(size, device=images.device)
    top, left = torch.randint(0, 2 * pad + 1, (2, b, 1, 1), device=images.device)
    rows, columns = top + pixels[:, None], left + pixels
    columns = torch.where(torch.rand(b, 1, 1, device=images.device) < 0.5, columns.flip(-1), columns)
    padded = functional.pad(images, (0, 0, pad, pad, pad, pad))
    cut = padded[torch.arange(b, device=images.device)[:, None, None], rows, columns]
    seen = ((cut.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    return seen if channels_last else seen.contiguous()


class Images(torch.utils.data.Dataset):
    """Torch data set of a source, read one batch at a time."""

    def __init__(self, source: Source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitems__(self, indices):
        return np.stack(self.source.read(indices)), self.source.labels[indices].astype(np.int64)


def collate(batch):
    return tuple(torch.from_numpy(array) for array in batch)


def torch_training(case: Case, source: Source, batch: int, resident: bool, variant: str, device: str):
    """Returns run(limit), which trains an epoch or its first `limit` steps."""
    channels_last, mode = TORCH_VARIANTS["gpu" if device == "cuda" else "cpu"][variant]
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    block = getattr(torch_twins, case.block)
    model = torch_twins.ResNet(block, case.stages, case.num_classes, stem=case.stem).to(device, memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4, fused=True)
    preprocessing = Preprocessing(image_size=case.size)
    mean, std = (torch.tensor(v, device=device) for v in (preprocessing.mean, preprocessing.std))

    def loss_of(images, labels):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits, _ = model(torch_view(images, case.size, mean, std, channels_last))
            return functional.cross_entropy(logits.float(), labels)

    loss_of = torch.compile(loss_of, mode=mode, dynamic=False) if mode else loss_of
    steps = len(source) // batch
    if resident:
        images = torch.from_numpy(np.stack(source.read(range(len(source))))).to(device)
        labels = torch.from_numpy(source.labels).long().to(device)

        def batches():
            order = torch.randperm(len(source), device=device)
            for i in range(steps):
                chosen = order[i * batch : (i + 1) * batch]
                yield images[chosen], labels[chosen]

    else:
        # On a CPU, training uses all cores and workers would only slow it down.
        workers = {"num_workers": max(1, (os.cpu_count() or 1) - 2), "persistent_workers": True,
                   "multiprocessing_context": "spawn", "pin_memory": True} if device == "cuda" else {}  # fmt: skip
        loader = torch.utils.data.DataLoader(
            Images(source), batch, shuffle=True, drop_last=True, collate_fn=collate, **workers
        )

        def batches():
            for images, labels in loader:
                yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def run(limit: int | None = None):
        losses = []
        for i, (seen, wanted) in enumerate(batches()):
            if i == limit:
                break
            if mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            loss = loss_of(seen, wanted)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().clone())
        return torch.stack(losses).mean().item()  # waits for the device

    return run


def seconds_of(run, *args) -> float:
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def fastest_torch(trial_steps: int, names, *args):
    """Finds the fastest torch variant in `names` that works here.

    Returns:
      Its name, its run function, the seconds of its first call, and {name: seconds of a trial} of all variants.
    """
    torch.compiler.reset()  # its limit on compiled programs holds for the whole process
    device, tried = args[-1], {}
    for name in names:
        run = torch_training(*args[:-1], name, device)
        try:
            first = seconds_of(run, 1)
            run(2)  # a CUDA graph is recorded in the second step
            tried[name] = (statistics.median(seconds_of(run, trial_steps) for _ in range(3)), run, first)
        except RuntimeError as error:  # torch.compile needs a C++ compiler, or Triton
            print(f"torch {name} does not run here: {str(error).splitlines()[0]}", file=sys.stderr)
    name = min(tried, key=lambda name: tried[name][0])
    return name, tried[name][1], tried[name][2], {name: round(trial[0], 4) for name, trial in tried.items()}


def compare(what, case, source, batch, resident, repeats, device, variants) -> dict:
    """Returns a row of medians over alternating runs, with the fastest torch variant."""
    ours, gigaflops = our_training(case, source, batch, resident)
    first = seconds_of(ours, 1)
    steps = len(source) // batch
    trial_steps = min(steps, 20 if device == "cuda" else 2)
    variant, theirs, torch_first, trials = fastest_torch(trial_steps, variants, case, source, batch, resident, device)
    seconds = {"ours": [], "torch": []}
    for _ in range(repeats):
        seconds["ours"].append(seconds_of(ours))
        seconds["torch"].append(seconds_of(theirs))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    row = {
        "what": what,
        "feed": "resident" if resident else "streaming",
        "batch": batch,
        "images": steps * batch,
        "steps_per_call": devices.steps_per_call(steps) if resident else devices.steps_per_call(steps, limit=16),
        **{f"{name}_images_per_second": round(steps * batch / value, 1) for name, value in median.items()},
        **{f"{name}_seconds": round(value, 4) for name, value in median.items()},
        "ratio": round(median["torch"] / median["ours"], 3),
        "ours_tflops": round(gigaflops * steps / median["ours"] / 1e3, 3),
        "ours_first_call_seconds": round(first, 2),
        "torch_first_call_seconds": round(torch_first, 2),
        "torch_variant": variant,
        "torch_trial_seconds": trials,
        "all_seconds": {name: [round(v, 4) for v in values] for name, values in seconds.items()},
    }
    if row["ratio"] < 1:
        with tempfile.TemporaryDirectory() as folder:
            row["profile_ms"] = profile(lambda: ours(2), folder)
    return row


def profile(run, folder) -> dict[str, float]:
    """Traces run() into `folder`, and returns the milliseconds of the slowest kinds of operations."""
    with jax.profiler.trace(str(folder)):
        run()
    kinds: collections.Counter = collections.Counter()
    for file in pathlib.Path(folder).rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for stream, event in ((line.name, event) for line in plane.lines for event in line.events):
                # Kernels that a GPU replays as a graph have no operation name.
                kernel = event.name if stream.startswith("Stream") else None
                if name := dict(event.stats).get("hlo_op", kernel):
                    kinds[re.sub(r"[.\d]+$", "", str(name))] += event.duration_ns / 1e6
    return {name: round(value, 1) for name, value in kinds.most_common(10)}


def random_images(case: Case, n: int) -> Source:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % case.num_classes
    names = [str(c) for c in range(case.num_classes)]
    return from_arrays(
        rng.integers(0, 256, (n, case.size, case.size, 3), np.uint8), labels, "random", class_names=names
    )


def cifar10(n: int | None) -> tuple[Source, str]:
    """Returns all or n training images of CIFAR-10, and their name."""
    if os.environ.get("TFDS_DATA_DIR"):
        return load_source("tfds:cifar10" + (f"?train={n}" if n else ""), "train"), "tfds:cifar10"
    return random_images(RESNET18, n or 50_000), "random images of CIFAR-10's shape (TFDS_DATA_DIR is not set)"


def table(rows) -> str:
    head = f"{'':8} {'feed':10} {'batch':>5} {'images':>6} {'ours img/s':>10} {'torch':>9} {'ratio':>6} {'ours s':>8}"
    head += f" {'TFLOP/s':>8}  torch is"
    line = (
        "{what:8} {feed:10} {batch:5d} {images:6d} {ours_images_per_second:10.1f} {torch_images_per_second:9.1f} "
        "{ratio:6.2f} {ours_seconds:8.3f} {ours_tflops:8.2f}  {torch_variant}"
    )
    return "\n".join([head, *(line.format(**row) for row in rows)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="step18,step50,epoch", help="what to measure, comma-separated")
    parser.add_argument("--batch", type=int, help="one batch size instead of the defaults")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs per side (default: 5)")
    parser.add_argument("--images", type=int, help=f"images per epoch (default: all; on a CPU {CPU_EPOCH_IMAGES})")
    parser.add_argument("--out", type=pathlib.Path, help="write the rows as JSON")
    parser.add_argument("--profile", metavar="DIR", help="only write a profiler trace of a few of our steps per case")
    flags = parser.parse_args()
    kind = "cpu" if jax.default_backend() == "cpu" else "gpu"
    device = "cuda" if kind == "gpu" else "cpu"
    torch.backends.cudnn.benchmark = True
    if device == "cuda":  # on a CPU this would let torch round to bfloat16, which our side does not
        torch.set_float32_matmul_precision("high")
    head = {"device": devices.description(), "jax": jax.__version__, "torch": torch.__version__, "cpus": os.cpu_count()}
    head["load"] = round(os.getloadavg()[0], 1)  # other programs slow torch far more than us: run nothing else
    print(json.dumps(head), flush=True)
    rows, data = [], {}
    for what in flags.what.split(","):
        if what not in SIZES[kind]:
            parser.error(f"--what: {what!r} is not in {', '.join(SIZES[kind])}")
        batches, steps = SIZES[kind][what]
        case = RESNET50 if what == "step50" else RESNET18
        for batch in (flags.batch,) if flags.batch else batches:
            if flags.profile:
                run, _ = our_training(case, random_images(case, 4 * batch), batch, resident=True)
                run()
                print(what, json.dumps(profile(run, pathlib.Path(flags.profile) / f"{what}_{batch}")), flush=True)
                continue
            if what == "epoch":
                source, data[what] = cifar10(flags.images or (CPU_EPOCH_IMAGES if kind == "cpu" else None))
            else:
                source, data[what] = random_images(case, steps * batch), f"random images, {steps} steps a run"
            variants = list(TORCH_VARIANTS[kind])
            for resident in (True, False) if what == "epoch" else (True,):
                rows.append(compare(what, case, source, batch, resident, flags.repeats, device, variants))
                variants = [rows[-1]["torch_variant"]]  # also the fastest one with a DataLoader
                print(json.dumps(rows[-1]), flush=True)
                if flags.out:
                    flags.out.parent.mkdir(parents=True, exist_ok=True)
                    flags.out.write_text(json.dumps({**head, "data": data, "rows": rows}, indent=1) + "\n")
    if rows:
        print(table(rows))
        print("data: " + "; ".join(f"{what}: {text}" for what, text in data.items()))
        if kind == "cpu":
            print(f"CPU run: smaller batches, fewer steps, {flags.images or CPU_EPOCH_IMAGES} images per epoch.")


if __name__ == "__main__":
    main()
