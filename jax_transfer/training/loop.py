"""The one training loop: pre-training and every kind of fine-tuning go through `train`."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from jax_transfer import devices, logs
from jax_transfer.data.batches import Joined


@dataclasses.dataclass(frozen=True)
class Epoch:
    """Where a training stands at the end of an epoch, or where it stopped within one.

    number: from 1. state: donated as soon as the next epoch is asked for. metrics: name -> values of the epoch's steps so
    far, [steps], or [rows, steps] where several states train side by side. seconds: those of its training.
    diverged_at: for each row, the first step of the epoch whose loss is NaN or infinite, None if there is none.
    stopped: `stop` returned True before the epoch was over, or at its end.
    """

    number: int
    state: dict
    metrics: dict[str, np.ndarray]
    seconds: float
    images_per_second: float
    diverged_at: tuple[int | None, ...]
    stopped: bool

    @property
    def means(self) -> dict[str, np.ndarray]:
        """The mean of each metric over the steps."""
        return {name: values.mean(-1) for name, values in self.metrics.items()}

    def begun(self) -> dict:
        """What `train` needs, beside the state, to resume within this epoch; JSON holds it."""
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
    begun: dict | None = None,
) -> Iterator[Epoch]:
    """Trains from wherever `state["step"]` stands until `total_steps`, and yields every epoch as it ends.

    The last epoch is the one in which training stops: after `total_steps`, after `stop` returned True, or once the loss of
    every row was NaN or infinite.

    Args:
      run: what `steps.many_steps` or `many_steps_of_many` compiled. It donates the state.
      what: for the progress line, such as "pretrain".
      max_steps: the most steps of one compiled call.
      stop: asked after each compiled call.
      begun: `Epoch.begun` of a stopped epoch, whose state this is.
    """
    step = int(np.ravel(jax.device_get(state["step"]))[0])
    rows = int(np.size(jax.device_get(state["step"])))
    per_epoch, images = feed.steps_per_epoch, feed.batch_size * rows
    while step < total_steps or begun:
        number, start = divmod(step, per_epoch)
        if begun and start == 0:  # stopped between the last step of an epoch and its end
            number, start = number - 1, per_epoch
        end = min(per_epoch, start + total_steps - step)
        history = _History(rows, begun, step)
        begun, stopped, started = None, False, time.perf_counter()
        # A divisor of all three: one compiled program serves, and the epoch ends, or training within it, where a call does.
        count = devices.steps_per_call(math.gcd(per_epoch, start, end), min(max_steps, feed.max_steps))
        label = f"{what}, epoch {number + 1}/{-(-total_steps // per_epoch)}"
        waiting: collections.deque = collections.deque()
        with logs.progress((end - start) * images, label, "images") as bar:
            for items in feed.items(range(step, step + end - start), count, seed) if start < end else ():
                state, metrics = run(state, feed.held, items, count)
                waiting.append(metrics)
                step += count
                if len(waiting) > 2:  # look at a call's metrics only when the next ones are already under way
                    history.add(jax.device_get(waiting.popleft()))
                bar.update(count * images)
                stopped = stop()
                if stopped or history.all_diverged():
                    break
            for metrics in waiting:
                history.add(jax.device_get(metrics))
        seconds = history.seconds + time.perf_counter() - started
        yield Epoch(
            number + 1,
            state,
            history.metrics(),
            seconds,
            end * images / seconds,
            tuple(history.diverged_at),
            stopped,
        )
        if stopped or history.all_diverged():
            return


class _History:
    """The metrics of an epoch, call by call, and where each row diverged."""

    def __init__(self, rows: int, begun: dict | None, step: int):
        """begun: of the part that was trained before, which ended before `step`."""
        self.calls = [{n: np.asarray(v, np.float32) for n, v in begun["metrics"].items()}] if begun else []
        self.seconds = begun["seconds"] if begun else 0.0
        self.step, self.diverged_at = step, [None] * rows

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        self.calls.append(metrics)
        losses = np.atleast_2d(metrics["loss"])
        for row, own in enumerate(losses):
            if self.diverged_at[row] is None:
                self.diverged_at[row] = first_bad_step(self.step, own)
        self.step += losses.shape[-1]

    def all_diverged(self) -> bool:
        return all(step is not None for step in self.diverged_at)

    def metrics(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate([call[name] for call in self.calls], -1) for name in self.calls[0]}


def first_bad_step(first: int, losses: np.ndarray) -> int | None:
    """The step of the first loss that is NaN or infinite in losses [t] that begin at step `first`, or None."""
    bad = np.flatnonzero(~np.isfinite(losses))
    return first + int(bad[0]) if len(bad) else None
