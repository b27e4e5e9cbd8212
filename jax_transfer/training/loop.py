"""The one training loop: pre-training and every kind of fine-tuning run through `fit`."""

import collections
import math
import time
from collections.abc import Callable

import jax
import numpy as np

from jax_transfer import devices, logs
from jax_transfer.data.batches import Feed


def fit(
    state: dict,
    run: Callable,
    feed: Feed,
    *,
    seed: int,
    batch_size: int,
    total_steps: int,
    what: str,
    on_metrics: Callable[[int, dict], None],
    on_epoch: Callable[[int, dict, dict], bool | None],
    max_steps: int = devices.MAX_STEPS_PER_CALL,
    stop: Callable[[], bool] = lambda: False,
    on_stop: Callable[[dict, dict], None] = lambda state, so_far: None,
    so_far: dict | None = None,
) -> dict:
    """Trains from wherever `state["step"]` stands until `total_steps`.

    Args:
      run: what `steps.many_steps` or `many_steps_of_many` compiled.
      what: for the progress line, such as "pretrain".
      on_metrics: called with the first step and the metrics ([t] each, or [rows, t]) of each compiled call.
      on_epoch: called at the end of each epoch with its number (from 1), the state, and
        {"images_per_second", "seconds"} plus the mean of each metric over the epoch's last axis. True if it was told to
        stop before it was done: it will be called again for that epoch.
      max_steps: of one compiled call.
      stop: asked after each compiled call. Once it, or `on_epoch`, says so, `on_stop` gets the state and the epoch's metrics
        so far, and training ends.
      so_far: what `on_stop` got with the state that training goes on from, for an epoch that was begun then.

    Returns:
      The final state. The state passed in is donated.
    """
    steps_an_epoch = len(feed.source) // batch_size
    step = int(np.ravel(jax.device_get(state["step"]))[0])
    rows = int(np.size(jax.device_get(state["step"])))
    while step < total_steps or so_far:
        epoch, start = divmod(step, steps_an_epoch)
        if so_far and start == 0:  # stopped between the last step of an epoch and its end
            epoch, start = epoch - 1, steps_an_epoch
        end = min(steps_an_epoch, start + total_steps - step)
        begun, history, stopped = time.perf_counter(), [], False
        if so_far:
            history.append({name: np.asarray(values, np.float32) for name, values in so_far["metrics"].items()})
            begun -= so_far["seconds"]
            so_far = None
        # Where training ends within an epoch, its calls end there too.
        limit = max_steps if end == steps_an_epoch else _divisor(math.gcd(steps_an_epoch, start, end), max_steps)
        waiting: collections.deque = collections.deque()
        images = (end - start) * batch_size * rows

        def collect(waiting=waiting, history=history):
            first, metrics = waiting.popleft()
            metrics = jax.device_get(metrics)
            on_metrics(first, metrics)
            history.append(metrics)

        with logs.progress(images, f"{what}, epoch {epoch + 1}/{-(-total_steps // steps_an_epoch)}", "images") as bar:
            calls = feed.training_calls(epoch, start, seed, batch_size, limit) if start < end else ()
            for held, items, count in calls:
                if step >= total_steps:
                    break
                state, metrics = run(state, held, items, count)
                waiting.append((step, metrics))
                step += count
                if len(waiting) > 2:  # look at a call's metrics only when the next ones are already under way
                    collect()
                bar.update(count * batch_size * rows)
                stopped = stop()
                if stopped:
                    break
            while waiting:
                collect()
        seconds = time.perf_counter() - begun
        metrics = {name: np.concatenate([m[name] for m in history], -1) for name in history[0]}
        means = {name: values.mean(-1) for name, values in metrics.items()}
        speed = {"seconds": seconds, "images_per_second": end * batch_size * rows / seconds}
        if stopped or on_epoch(epoch + 1, state, {**means, **speed}):
            on_stop(state, {"metrics": {name: values.tolist() for name, values in metrics.items()}, "seconds": seconds})
            return state
    return state


def _divisor(number: int, most: int) -> int:
    return max(n for n in range(1, min(number, most) + 1) if number % n == 0)


def first_bad_step(first: int, losses: np.ndarray) -> int | None:
    """The step of the first loss that is NaN or infinite in losses [t] that begin at step `first`, or None."""
    bad = np.flatnonzero(~np.isfinite(losses))
    return first + int(bad[0]) if len(bad) else None
