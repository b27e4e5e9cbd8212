"""Compares ranking for image-text retrieval with numpy that ranks one query at a time: time and memory.

python tests/benchmarks/retrieval.py [--images=5000 --captions=25000 --embeddings=2 --dim=1024 --sample=50 --runs=1]

Prints one JSON line with the seconds of ranking all captions for each image and all images for each caption, their
ratio (numpy / ours; goal: at least 5 on two CPU cores) and the memory of ours in MB (goal: at most 1,000): arguments
and temporaries of the compiled programs, and how much the peak of the process grew while they ran, beyond what it held
before the embeddings were made. Both sides run in float32 on all cores, and return the same ranks; numpy's time is that
of `--sample` queries in each direction, evenly spaced, times the number of queries over the sample. `cpu_seconds` and
`cpu_ratio` compare processor time, which means more where other programs run beside. Compilation is not counted, and
shown.
"""

import argparse
import json
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jax_transfer.transfer.retrieval import ranks


def embeddings(rng, like, noise):
    """Draws unit vectors around others."""
    x = like + np.float32(noise) * rng.standard_normal(like.shape, np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return x


def plain_rank(query, items, matches):
    """Ranks the items [m, k, e] for one query [k, e], as the protocol is usually written."""
    similarity = (items.reshape(-1, items.shape[-1]) @ query.T).reshape(len(items), -1).max(1)
    return int(np.sum(similarity[~matches] >= similarity[matches].max()))


def timed(function):
    """Returns (result, seconds, processor seconds)."""
    began, processor = time.perf_counter(), time.process_time()
    result = function()
    return result, time.perf_counter() - began, time.process_time() - processor


def peak():
    """Returns the most memory that the process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("images", 5_000),
        ("captions", 25_000),
        ("embeddings", 2),
        ("dim", 1024),
        ("sample", 50),
        ("runs", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    jax.block_until_ready(jnp.zeros(1) @ jnp.zeros(1))  # the runtime itself
    before, rng = peak(), np.random.default_rng(0)
    shape = (flags.images, flags.embeddings, flags.dim)
    numbers, owner = np.arange(flags.images), np.arange(flags.captions) * flags.images // flags.captions
    images = embeddings(rng, rng.standard_normal(shape, np.float32), 0)
    captions = np.empty((flags.captions, *shape[1:]), np.float32)
    for start in range(0, flags.captions, 1000):  # so that making them takes no more memory than ranking them
        rows = slice(start, start + 1000)
        captions[rows] = embeddings(rng, images[owner[rows]], 0.3)
    images, captions = (jax.block_until_ready(jnp.asarray(x)) for x in (images, captions))  # numpy's copies are freed
    directions = {
        "image_to_text": (images, captions, jnp.asarray(numbers), jnp.asarray(owner)),
        "text_to_image": (captions, images, jnp.asarray(owner), jnp.asarray(numbers)),
    }
    report = {"device": jax.devices()[0].device_kind, **vars(flags)}
    totals = dict.fromkeys(("ours", "numpy", "ours_cpu", "numpy_cpu", "compilation"), 0.0)
    found, programs = {}, []
    for name, arguments in directions.items():
        compiled, seconds, _ = timed(lambda arguments=arguments: ranks.lower(*arguments).compile())
        totals["compilation"] += seconds
        runs = [timed(lambda: jax.block_until_ready(compiled(*arguments))) for _ in range(flags.runs)]  # noqa: B023
        found[name] = np.asarray(runs[0][0])
        totals["ours"] += statistics.median(run[1] for run in runs)
        totals["ours_cpu"] += statistics.median(run[2] for run in runs)
        memory = compiled.memory_analysis()
        programs.append(memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes)
    report["peak_growth_mb"] = round(peak() - before)
    report["program_mb"] = round(max(programs) / 1e6)
    differing = 0
    for name, arguments in directions.items():
        queries, items, query_ids, item_ids = (np.asarray(x) for x in arguments)
        chosen = np.linspace(0, len(queries) - 1, min(flags.sample, len(queries))).astype(int)
        plain_rank(queries[0], items, item_ids == query_ids[0])

        def sample(queries=queries, items=items, query_ids=query_ids, item_ids=item_ids, chosen=chosen):
            return [plain_rank(queries[i], items, item_ids == query_ids[i]) for i in chosen]

        expected, seconds, processor = timed(sample)
        totals["numpy"] += seconds * len(queries) / len(chosen)
        totals["numpy_cpu"] += processor * len(queries) / len(chosen)
        differing += int(np.sum(found[name][chosen] != expected))
    report |= {
        "ours_seconds": round(totals["ours"], 1),
        "numpy_seconds": round(totals["numpy"], 1),
        "ratio": round(totals["numpy"] / totals["ours"], 2),
        "ours_cpu_seconds": round(totals["ours_cpu"], 1),
        "numpy_cpu_seconds": round(totals["numpy_cpu"], 1),
        "cpu_ratio": round(totals["numpy_cpu"] / totals["ours_cpu"], 2),
        "compilation_seconds": round(totals["compilation"], 1),
        "ranks_that_differ": differing,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
