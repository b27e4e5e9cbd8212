"""The training step and the evaluation step: pure functions of a state and a batch, jitted once.

A state is a dictionary {"params", "stats", "opt_state", "step", "key"} of arrays. With a moving average it also holds
"ema": {"params", "stats"}, and that is the model that is evaluated and transferred.
"""

import collections
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from jax_transfer import devices
from jax_transfer.data import augment
from jax_transfer.data.batches import Feed
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.net import Net
from jax_transfer.records import Batch


def init_state(params, stats, optimizer: optax.GradientTransformation, seed: int, ema: bool = False) -> dict:
    """The state at step 0. ema: keep a moving average of params and stats, which begins as they do."""
    # Copies, for the step donates every array of the state, and can donate each but once.
    average = {"ema": jax.tree.map(jnp.copy, {"params": params, "stats": stats})} if ema else {}
    return {
        "params": params,
        "stats": stats,
        "opt_state": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
        "key": jax.random.key_data(jax.random.key(seed)),
        **average,
    }


def evaluated(state: dict) -> dict:
    """{"params", "stats"} of the model that a state stands for: the moving average where there is one."""
    return state.get("ema") or {name: state[name] for name in ("params", "stats")}


def make_train_step(
    net: Net,
    objective: Callable,
    optimizer: optax.GradientTransformation,
    view: Callable[[jax.Array, Batch, int], Batch],
    ema_decay: float = 0.0,
) -> Callable[[dict, Batch], tuple[dict, dict]]:
    """Returns step(state, batch) -> (state, metrics).

    Args:
      objective: see `training.objectives`.
      view: (key, batch of uint8 images, number of classes) -> batch that the model sees: augmented and normalised.
      ema_decay: the moving average becomes ema_decay * average + (1 - ema_decay) * new after each step; 0: there is none.
        The state must hold it then, see `init_state`.
    """

    def step(state: dict, batch: Batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        key_view, key_net = jax.random.split(key)
        seen = view(key_view, batch, net.num_classes)

        def loss(params):
            return objective(net, params, state["stats"], seen, key_net)

        gradient, (stats, metrics) = jax.grad(loss, has_aux=True)(state["params"])
        updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {"params": params, "stats": stats, "opt_state": opt_state, "step": state["step"] + 1}
        if ema_decay:
            model = {"params": params, "stats": stats}
            # In this form what does not change keeps its bits, though decay and 1 - decay, rounded, need not add up to 1.
            new["ema"] = jax.tree.map(lambda a, b: a + (1 - ema_decay) * (b - a), state["ema"], model)
        return {**new, "key": state["key"]}, metrics

    return step


def training_view(names: tuple[str, ...], preprocessing: Preprocessing):
    """The `view` of `make_train_step`: augmentations by name, then normalisation."""
    return lambda key, batch, num_classes: augment.apply(key, batch, names, preprocessing, num_classes)


def train_step_gigaflops(
    step, net: Net, optimizer, preprocessing: Preprocessing, batch_size: int, ema: bool = False
) -> float:
    """The work of one training step, by the compiler's cost analysis of shapes alone."""
    state = jax.eval_shape(
        lambda key: init_state(*net.init(key), optimizer, 0, ema),
        jax.ShapeDtypeStruct((), jax.random.key(0).dtype),
    )
    size = preprocessing.host_size
    batch = Batch(
        images=jax.ShapeDtypeStruct((batch_size, size, size, 3), np.uint8),
        labels=jax.ShapeDtypeStruct((batch_size,), np.int32),
        mask=jax.ShapeDtypeStruct((batch_size,), bool),
    )
    return devices.gigaflops(step, state, batch)


def many_steps(step: Callable, fetch: Callable, mesh: Mesh):
    """Compiles `count` training steps into one call on a mesh; the state is donated.

    Returns run(state, held, items, count) -> (state, metrics [count]), where `fetch(held, step, item)`
    makes each step's batch: see `data.batches`.
    """
    return jax.jit(_steps(step, fetch, mesh), static_argnums=3, donate_argnums=0)


def many_steps_of_many(step: Callable, fetch: Callable, mesh: Mesh):
    """`many_steps` for independent states stacked on a leading axis, one a row of the `sweep` axis.

    Each device runs the plain program of one state: convolutions are never batched over kernels.
    """

    @functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
    def run(states, held, items, count):
        def one(states, held, items):
            state, metrics = _steps(step, fetch, None)(_first(states), held, items, count)
            return _with_axis(state), _with_axis(metrics)

        specs = (PartitionSpec("sweep"), PartitionSpec(), PartitionSpec())
        mapped = jax.shard_map(
            one, mesh=mesh, in_specs=specs, out_specs=(PartitionSpec("sweep"), PartitionSpec("sweep")), check_vma=False
        )
        return mapped(states, held, items)

    return run


def _steps(step, fetch, mesh: Mesh | None):
    def run(state, held, items, count):
        def body(state, item):
            batch = fetch(held, state["step"], item)
            if mesh is not None:
                batch = devices.constrain(batch, mesh, "data")
            return step(state, batch)

        if count == 1:  # no loop at all: see devices.steps_per_call
            state, metrics = body(state, jax.tree.map(lambda x: x[0], items))
            return state, _with_axis(metrics)
        return jax.lax.scan(body, state, items, length=count)

    return run


def make_evaluation(net: Net, preprocessing: Preprocessing, mesh: Mesh):
    """Compiles evaluate(counts, model, batch) -> counts: adds a batch to the counts of `zero_counts`."""

    @jax.jit
    def evaluate(counts, model, batch: Batch):
        return _count_correct(net, preprocessing, counts, model, devices.constrain(batch, mesh, "data"))

    return evaluate


def make_evaluation_of_many(net: Net, preprocessing: Preprocessing, mesh: Mesh):
    """`make_evaluation` for models stacked over the `sweep` axis: counts are [rows, c]."""

    @jax.jit
    def evaluate(counts, model, batch: Batch):
        def one(counts, model, batch):
            return _with_axis(_count_correct(net, preprocessing, _first(counts), _first(model), batch))

        rows = PartitionSpec("sweep")
        mapped = jax.shard_map(one, mesh=mesh, in_specs=(rows, rows, PartitionSpec()), out_specs=rows, check_vma=False)
        return mapped(counts, model, batch)

    return evaluate


def _count_correct(net, preprocessing, counts, model, batch):
    output = net.apply(model["params"], model["stats"], augment.evaluation_view(batch.images, preprocessing))
    found = {
        "correct": output.logits.argmax(-1) == batch.labels,
        "count": batch.mask,
        "not_finite": ~jnp.isfinite(output.logits).all(-1),
    }
    classes = jnp.eye(net.num_classes, dtype=jnp.int32)[batch.labels]
    return {name: counts[name] + (classes * (rows & batch.mask)[:, None]).sum(0) for name, rows in found.items()}


def count_correct(
    evaluate, model: dict, feed: Feed, batch_size: int, counts: dict, stop: Callable[[], bool] = lambda: False
) -> dict | None:
    """Per-class counts over a whole feed, on the host; `counts` are zeros of the right shape and placement.

    None if `stop`, asked after each batch, said so.
    """
    under_way: collections.deque = collections.deque()
    for batch in feed.evaluation_batches(batch_size):
        counts = evaluate(counts, model, batch)
        under_way.append(counts)
        if len(under_way) > 2:  # keeps the device busy, and `stop` in time
            jax.block_until_ready(under_way.popleft())
        if stop():
            return None
    return jax.device_get(counts)


def zero_counts(shape: tuple[int, ...]) -> dict:
    """Images of each class [..., c]: those classified correctly, all, and those with a NaN or infinite logit."""
    return {name: np.zeros(shape, np.int32) for name in ("correct", "count", "not_finite")}


def accuracies(counts: dict) -> tuple[float, float]:
    """(accuracy over images, mean of the accuracies of the classes that occur) of per-class counts [c]."""
    correct, count = counts["correct"], counts["count"]
    seen = count > 0
    return float(correct.sum() / count.sum()), float((correct[seen] / count[seen]).mean())


def _first(tree):
    return jax.tree.map(lambda x: x[0], tree)


def _with_axis(tree):
    return jax.tree.map(lambda x: x[None], tree)
