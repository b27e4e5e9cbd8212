"""The training loop, shared by pre-training and every kind of fine-tuning."""

import bisect
import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jax_transfer import devices, logs
from jax_transfer.data.batches import Joined


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The result of training for an epoch, or for the part of it before a pause or a stop.

    Attributes:
      number: number of the epoch, from 1.
      step: number of training steps so far, since the start of training.
      state: training state; its arrays are donated when the next epoch is requested.
      metrics: name -> values of the steps of this epoch, [steps], or [rows, steps] if several states are trained.
      seconds: training time of the epoch so far.
      images_per_second: training speed, over all rows.
      diverged_at: for each row, the first step of this epoch with a NaN or infinite loss, or None.
      stopped: whether `stop` returned True during the epoch or at its end.
    """

    number: int
    step: int
    state: dict
    metrics: dict[str, np.ndarray]
    seconds: float
    images_per_second: float
    diverged_at: tuple[int | None, ...]
    stopped: bool

    @property
    def means(self) -> dict[str, np.ndarray]:
        """Mean of each metric over the steps."""
        return {name: values.mean(-1) for name, values in self.metrics.items()}

    def begun(self) -> dict:
        """Returns what `train` needs, besides the state, to resume within this epoch; it can be stored as JSON."""
        return {"metrics": {name: values.tolist() for name, values in self.metrics.items()}, "seconds": self.seconds}


def train(
    state: dict,
    run: Callable,
    feed: Joined,
    *,
    seed: int,
    total_steps: int,
    what: str,
    max_steps: int = devices.MAX_STEPS_PER_CALL,
    stop: Callable[[], bool] = lambda: False,
    pauses: Iterable[int] = (),
    begun: dict | None = None,
    advice: str = "use a smaller batch.",
) -> Iterator[Epoch]:
    """Trains from `state["step"]` to `total_steps` and yields each epoch when it ends.

    Training stops after `total_steps`, when `stop` returns True, or when the loss of every row is NaN or infinite; the
    epoch in which it stops is yielded too. At a pause, the epoch so far is yielded, and yielded again when it ends.

    Args:
      state: training state, see `training.state`, with a leading axis of rows if `run` trains several states.
      run: result of `steps.many_steps` or `many_steps_of_many`. It donates the state.
      feed: training images.
      seed: seed of the batches.
      total_steps: number of steps, including those that the state has already made.
      what: label of the progress bar, such as "pretrain".
      max_steps: maximum number of steps per compiled call.
      stop: called after each compiled call.
      pauses: steps, up to `total_steps`, after which training pauses although the epoch has not ended.
      begun: `Epoch.begun()` of an unfinished epoch that is to be resumed from `state`. If `state` is at a pause or at
        the end of the epoch, that is yielded first.
      advice: what to do if a step does not fit into memory, see `steps.memory_advice`.

    Raises:
      InputError: if the memory of a device does not suffice; the message ends with `advice`.

    Example:
      >>> import types
      >>> def items(steps, count, seed):
      ...     return (None for _ in range(len(steps) // count))
      >>> def run(state, held, item, count):
      ...     return {"step": state["step"] + count}, {"loss": np.zeros(count)}
      >>> feed = types.SimpleNamespace(steps_per_epoch=2, batch_size=8, max_steps=10, held=None, items=items)
      >>> epochs = train({"step": np.array(0)}, run, feed, seed=0, total_steps=4, what="toy")
      >>> [(epoch.number, int(epoch.state["step"]), float(epoch.means["loss"])) for epoch in epochs]
      [(1, 2, 0.0), (2, 4, 0.0)]
      >>> epochs = train({"step": np.array(0)}, run, feed, seed=0, total_steps=4, what="toy", pauses=[3])
      >>> [(epoch.number, epoch.step) for epoch in epochs]
      [(1, 2), (2, 3), (2, 4)]
    """
    step = int(np.ravel(jax.device_get(state["step"]))[0])
    rows = int(np.size(jax.device_get(state["step"])))
    per_epoch, images = feed.steps_per_epoch, feed.batch_size * rows
    ends = sorted({*pauses, total_steps})
    count = devices.steps_per_call(min(per_epoch, total_steps), min(max_steps, feed.max_steps))
    yielded = step - 1 if begun else step  # what ends here was not yielded if training was stopped here
    while yielded < total_steps:
        number = yielded // per_epoch
        first = number * per_epoch
        end = min(first + per_epoch, ends[bisect.bisect_right(ends, yielded)])
        history, stopped, started = _History(rows, begun, step), False, time.perf_counter()
        label = f"{what}, epoch {number + 1}/{-(-total_steps // per_epoch)}"
        waiting: collections.deque = collections.deque()
        with devices.explain_out_of_memory(advice), logs.progress((end - step) * images, label, "images") as bar:
            for items, made in _calls(feed, range(step, end), count, seed):
                state, metrics = run(state, feed.held, items, made)
                waiting.append(metrics)
                step += made
                if len(waiting) > 2:  # read the metrics of a call only when the next two are already running
                    history.add(jax.device_get(waiting.popleft()))
                bar.update(made * images)
                stopped = stop()
                if stopped or history.all_diverged():
                    break
            for metrics in waiting:
                history.add(jax.device_get(metrics))
        seconds = history.seconds + time.perf_counter() - started
        speed = (step - first) * images / seconds
        epoch = Epoch(number + 1, step, state, history.metrics(), seconds, speed, tuple(history.diverged_at), stopped)
        begun = epoch.begun() if step % per_epoch else None
        yield epoch
        if stopped or history.all_diverged():
            return
        yielded = step


def _calls(feed: Joined, steps: range, count: int, seed: int) -> Iterator[tuple[Any, int]]:
    """Yields the items of each compiled call and its number of steps: `count`, then 1 for the steps that are left over.

    Training can therefore pause at any step, and two programs suffice, wherever the pauses are.
    """
    whole = len(steps) // count * count
    for part, size in ((steps[:whole], count), (steps[whole:], 1)):
        for items in feed.items(part, size, seed) if part else ():
            yield items, size


class _History:
    """Collects the metrics of an epoch, one entry per call, and the step at which each row diverged."""

    def __init__(self, rows: int, begun: dict | None, step: int):
        """Starts with the metrics in `begun`, from the part of the epoch before `step`, the next step."""
        self.calls = [{n: np.asarray(v, np.float32) for n, v in begun["metrics"].items()}] if begun else []
        self.seconds = begun["seconds"] if begun else 0.0
        self.step = step
        self.diverged_at: list[int | None] = [None] * rows

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        self.calls.append(metrics)
        losses = np.atleast_2d(metrics["loss"])
        for row, row_losses in enumerate(losses):
            if self.diverged_at[row] is None:
                self.diverged_at[row] = first_bad_step(self.step, row_losses)
        self.step += losses.shape[-1]

    def all_diverged(self) -> bool:
        return all(step is not None for step in self.diverged_at)

    def metrics(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate([call[name] for call in self.calls], -1) for name in self.calls[0]}


def first_bad_step(first: int, losses: np.ndarray) -> int | None:
    """Returns the first step with a NaN or infinite loss, or None; losses [t] begin at step `first`.

    Example:
      >>> import numpy as np
      >>> first_bad_step(10, np.array([0.5, np.nan])), first_bad_step(10, np.array([0.5, 0.4]))
      (11, None)
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    return first + int(bad[0]) if len(bad) else None
