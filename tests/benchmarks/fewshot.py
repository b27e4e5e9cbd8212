"""Compares weight imprinting in one compiled call with a loop of numpy episodes: seconds and accuracies.

python tests/benchmarks/fewshot.py [--episodes=100 --classes=200 --seen=100 --images=30 --test=10000 --d=512 --shots=5]

Prints one JSON line for each of two loops: the median seconds of alternating runs, by the clock and of processor time
(all threads), and their ratios (numpy / ours; goal: at least 10 on two CPU cores). Both sides are given the episodes
and start from the same embeddings. The loop "plain" does for each episode what its formula says: it divides the
embeddings by their lengths, averages class by class, and takes the largest cosine among all classes. "tuned" keeps all
that episodes share: the directions, and the cosines of the test images with the seen classes; what remains is hardly
more than the matrix product with the prototypes, which numpy computes as fast as XLA does. --seen=0 imprints all
classes. --numpy sets how many of the episodes numpy computes; its seconds are those of all, in proportion. On a machine
that does other work too, the seconds of the processor say more than those of the clock.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import jax_transfer  # noqa: F401 - sets XLA_FLAGS before JAX starts
from jax_transfer.transfer.fewshot import FewShotProblem, draw_episodes, imprint, split_classes


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def accuracies(scores, y_test, num_seen):
    """Returns the accuracies on unseen, seen and all classes; the first classes are seen."""
    right = scores.argmax(1) == y_test
    is_seen = y_test < num_seen
    return right[~is_seen].mean(), right[is_seen].mean() if num_seen else np.nan, right.mean()


def plain(problem, rows):
    num_seen = len(problem.split.seen)
    values = []
    for episode in rows:
        learned = [] if num_seen == 0 else [unit(problem.weights)]
        imprinted = [unit(unit(problem.x[images]).mean(0)) for images in episode]
        scores = unit(problem.x_test) @ np.concatenate([*learned, np.stack(imprinted)]).T
        values.append(accuracies(scores, problem.y_test, num_seen))
    return values


def tuned(problem, rows):
    num_seen = len(problem.split.seen)
    x, x_test = unit(problem.x), unit(problem.x_test)
    learned = x_test @ unit(problem.weights).T if num_seen else np.zeros((len(x_test), 0), np.float32)
    values = []
    for episode in rows:
        scores = np.concatenate([learned, x_test @ unit(x[episode].mean(1)).T], axis=1)
        values.append(accuracies(scores, problem.y_test, num_seen))
    return values


def draw(flags):
    """Draws embeddings around a centre for each class, and takes the centres of the seen classes as their weights."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(flags.classes, flags.d)).astype(np.float32)

    def embeddings(y):
        return 0.2 * centres[y] + generator.normal(size=(len(y), flags.d)).astype(np.float32)

    y = np.repeat(np.arange(flags.classes), flags.images)
    y_test = generator.integers(flags.classes, size=flags.test)
    split = split_classes(flags.classes, seen=np.arange(flags.seen))
    return FewShotProblem(embeddings(y), y, embeddings(y_test), y_test, split, centres[: flags.seen])


def timed(function, *arguments):
    """Returns (seconds of the clock, seconds of the processor, result)."""
    clock, processor = time.perf_counter(), time.process_time()
    result = function(*arguments)
    return time.perf_counter() - clock, time.process_time() - processor, result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"episodes": 100, "classes": 200, "seen": 100, "images": 30, "test": 10_000, "d": 512, "shots": 5}
    for name, default in {**sizes, "numpy": 10, "runs": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    problem = draw(flags)
    rows = draw_episodes(problem.y, problem.split.unseen, flags.shots, flags.episodes, seed=0)
    some = rows[: flags.numpy]
    on_device = FewShotProblem(
        jnp.asarray(problem.x), problem.y, jnp.asarray(problem.x_test), problem.y_test, problem.split, problem.weights
    )
    first, _, result = timed(imprint, on_device, rows)
    sides = {
        "ours": lambda: imprint(on_device, rows),
        "plain": lambda: plain(problem, some),
        "tuned": lambda: tuned(problem, some),
    }
    seconds, values = {name: [] for name in sides}, {}
    for _ in range(flags.runs):
        for name, side in sides.items():
            *spent, values[name] = timed(side)
            seconds[name].append(np.array(spent) * (1 if name == "ours" else len(rows) / len(some)))
    medians = {name: [statistics.median(each) for each in zip(*runs, strict=True)] for name, runs in seconds.items()}
    ours = np.stack([result.unseen, result.seen, result.all], axis=1)[: len(some)]
    for name in ("plain", "tuned"):
        report = {
            "device": jax.devices()[0].device_kind,
            **vars(flags),
            "loop": name,
            "ours_seconds": [round(each, 3) for each in medians["ours"]],
            "numpy_seconds": [round(each, 3) for each in medians[name]],
            "ratio": round(medians[name][0] / medians["ours"][0], 2),
            "ratio_of_processor_seconds": round(medians[name][1] / medians["ours"][1], 2),
            "ours_first_call_seconds": round(first, 2),
            "largest_difference": float(np.nanmax(np.abs(ours - np.array(values[name])))),
            "accuracy": round(float(result.all.mean()), 3),
        }
        print(json.dumps(report))


if __name__ == "__main__":
    main()
