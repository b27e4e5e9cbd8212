"""The training step, a pure function of a state and the batches of its feeds, and many of them in one compiled call."""

import functools
from collections.abc import Callable, Mapping

import jax
import optax
from jax.sharding import Mesh, PartitionSpec

from jax_transfer import devices
from jax_transfer.data import augment
from jax_transfer.data.batches import abstract_batch
from jax_transfer.data.sources import Source
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.records import Batch
from jax_transfer.training.objectives import Objective


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    preprocessing: Preprocessing,
    num_classes: Mapping[str, int],
    ema_decay: float = 0.0,
) -> Callable[[dict, dict[str, Batch]], tuple[dict, dict]]:
    """Returns step(state, batches) -> (state, metrics): see `training.state`; batches: feed -> Batch of uint8 images.

    Args:
      num_classes: feed -> number of classes of its labels.
      ema_decay: the moving average becomes ema_decay * average + (1 - ema_decay) * new after each step; 0: there is none.
        The state must hold it then, see `init_state`.
    """

    def step(state: dict, batches: dict[str, Batch]):
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        key_views, key_loss = jax.random.split(key)
        views = augment.views(key_views, batches, objective.views, preprocessing, num_classes)

        def loss(params):
            return objective.loss(params, state["aux"], views, key_loss)

        (value, (aux, metrics)), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
        updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {**state, "params": params, "aux": aux, "opt_state": opt_state, "step": state["step"] + 1}
        if ema_decay:
            # In this form what does not change keeps its bits, though decay and 1 - decay, rounded, need not add up to 1.
            model = objective.model(params, aux)
            new["ema"] = jax.tree.map(lambda a, b: a + (1 - ema_decay) * (b - a), state["ema"], model)
        return new, {"loss": value, **metrics}

    return step


def train_step_gigaflops(
    step: Callable, state: dict, sizes: Mapping[str, tuple[Source, int]], preprocessing: Preprocessing
) -> float:
    """The work of one training step, by the compiler's cost analysis of shapes alone.

    Args:
      state: arrays, or their shapes and dtypes.
      sizes: feed -> (source, images a step), as `Joined.sizes`.
    """
    batches = {name: abstract_batch(preprocessing, size, source.extra) for name, (source, size) in sizes.items()}
    return devices.gigaflops(step, state, batches)


def many_steps(step: Callable, fetch: Callable, mesh: Mesh):
    """Compiles `count` training steps into one call on a mesh; the state is donated, and whole on every device.

    Returns run(state, held, items, count) -> (state, metrics [count]), where `fetch(held, item)` makes each step's batches:
    see `data.batches`.
    """
    whole = devices.replicated(mesh)
    return jax.jit(_steps(step, fetch, mesh), static_argnums=3, donate_argnums=0, out_shardings=(whole, whole))


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
            batches = fetch(held, item)
            if mesh is not None:
                batches = devices.constrain(batches, mesh, "data")
            return step(state, batches)

        if count == 1:  # no loop at all: see devices.steps_per_call
            state, metrics = body(state, _first(items))
            return state, _with_axis(metrics)
        return jax.lax.scan(body, state, items, length=count)

    return run


def _first(tree):
    return jax.tree.map(lambda x: x[0], tree)


def _with_axis(tree):
    return jax.tree.map(lambda x: x[None], tree)
