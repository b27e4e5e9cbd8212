"""The training step, a pure function of a state and its batches, and compiled calls that run many steps."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from jax_transfer import devices
from jax_transfer.data import augment
from jax_transfer.data.batches import abstract_batch
from jax_transfer.data.crops import crops_of
from jax_transfer.data.sources import Source
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.net import BLOCK
from jax_transfer.records import Batch, Views
from jax_transfer.training.objectives import Objective


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    preprocessing: Preprocessing,
    num_classes: Mapping[str, int],
    ema_decay: float = 0.0,
    remat: bool = False,
    microbatches: int = 1,
) -> Callable[[dict, dict[str, Batch]], tuple[dict, dict]]:
    """Returns step(state, batches) -> (state, metrics) for the state of `training.state`.

    `batches` maps each feed to a Batch of uint8 images; `metrics` holds the loss and the metrics of the objective.

    Args:
      objective: gives the loss that is minimised.
      optimizer: computes the updates.
      preprocessing: preprocessing of the images.
      num_classes: feed -> number of classes of its labels.
      ema_decay: after each step the moving average becomes ema_decay * average + (1 - ema_decay) * new; the state must
        hold it, see `init_state`. 0 means no moving average.
      remat: whether to keep only the outputs of the net's blocks for the backward pass, and to compute all other
        activations again: less memory for about a third more computation, with the same result up to rounding. XLA's
        CPU backend removes the repeated computation, so that on CPU nothing changes.
      microbatches: number of equal parts into which the views of a step are divided, to save memory. The parts are
        processed one after another and their gradients, losses and metrics are averaged, which gives those of the whole
        batch if the loss is a mean over images. It is not the same for a net with BatchNorm, which normalises each part
        by itself and updates its running statistics (`aux` in general) once per part, or for a loss that compares the
        images of a batch with each other, such as a contrastive one. The number must divide the images of each feed on
        each device, see `devices.check_microbatches`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_transfer.training.state import init_state
      >>> objective = Objective(
      ...     init=lambda key, model: ({"w": jnp.zeros(())}, {}),
      ...     loss=lambda params, aux, views, key: ((params["w"] - 1) ** 2, (aux, {})),
      ...     model=lambda params, aux: {"params": params, "stats": {}},
      ...     views={},
      ... )
      >>> step = make_train_step(objective, optax.sgd(0.5), Preprocessing(image_size=4), num_classes={})
      >>> state, metrics = step(init_state(objective, optax.sgd(0.5), seed=0), {})
      >>> float(metrics["loss"]), float(state["params"]["w"])
      (1.0, 1.0)
    """

    loss = objective.loss
    if remat:
        loss = jax.checkpoint(loss, policy=jax.checkpoint_policies.save_only_these_names(BLOCK))
    compute_gradient = jax.value_and_grad(loss, has_aux=True)
    if microbatches > 1:
        compute_gradient = _accumulated(compute_gradient, microbatches)

    def step(state: dict, batches: dict[str, Batch]):
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        key_views, key_loss = jax.random.split(key)
        views = augment.views(key_views, batches, objective.views, preprocessing, num_classes)
        (value, (aux, metrics)), gradient = compute_gradient(state["params"], state["aux"], views, key_loss)
        updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {**state, "params": params, "aux": aux, "opt_state": opt_state, "step": state["step"] + 1}
        if ema_decay:
            # With this formula, values that do not change stay bitwise the same, even if decay and 1 - decay do not sum
            # to exactly 1.
            model = objective.model(params, aux)
            new["ema"] = jax.tree.map(lambda a, b: a + (1 - ema_decay) * (b - a), state["ema"], model)
        return new, {"loss": value, **metrics}

    return step


def memory_advice(section: str, remat: bool, microbatches: int) -> str:
    """Returns what to do if a training step does not fit into memory, in terms of the fields of a config's section.

    >>> memory_advice("config.finetune", remat=True, microbatches=2)
    'with another --workdir, use more config.finetune.microbatches than 2 or a smaller config.finetune.batch_size.'
    """
    smaller = f"use more {section}.microbatches than {microbatches} or a smaller {section}.batch_size."
    first = "" if remat else f"add --{section}.remat=True to the command to resume it, or, "
    return f"{first}with another --workdir, {smaller}"


def _accumulated(compute_gradient: Callable, count: int) -> Callable:
    """Returns a function like `compute_gradient` that divides the views into `count` parts and averages the results.

    Args:
      compute_gradient: compute_gradient(params, aux, views, key) -> ((loss, (aux, metrics)), gradient).
      count: number of parts. All have the same number of images, none of which is padding, so each has the same weight.
    """

    def compute(params, aux, views: dict[str, Views], key):
        # Part j consists of the rows j, j + count, ... of the batch. They are taken from a [b / count, count, ...]
        # array, whose first axis is still split over the devices, so that each device works on its own images.
        divided = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]), views)

        def add_part(carry, j):
            aux, total = carry
            part = jax.tree.map(lambda x: x[:, j], divided)
            (value, (aux, metrics)), gradient = compute_gradient(params, aux, part, jax.random.fold_in(key, j))
            return (aux, jax.tree.map(jnp.add, total, gradient)), (value, metrics)

        start = (aux, jax.tree.map(jnp.zeros_like, params))
        unroll = devices.unrolled(count)
        (aux, total), (values, metrics) = jax.lax.scan(add_part, start, jnp.arange(count), unroll=unroll)
        mean = functools.partial(jnp.mean, axis=0)
        return (mean(values), (aux, jax.tree.map(mean, metrics))), jax.tree.map(lambda x: x / count, total)

    return compute


def train_step_gigaflops(
    step: Callable,
    state: dict,
    sizes: Mapping[str, tuple[Source, int]],
    views: Mapping[str, Sequence[Sequence[str]]],
    preprocessing: Preprocessing,
) -> float:
    """Counts the floating-point operations of one training step, in units of 1e9, with the compiler's cost analysis.

    Args:
      step: result of `make_train_step` without `remat` and `microbatches`: what `remat` computes again is not work of
        the model, and the compiler would count only one of the parts.
      state: arrays, or their shapes and dtypes.
      sizes: feed -> (source, images per step), as in `Joined.sizes`.
      views: `Objective.views`.
      preprocessing: preprocessing of the images.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_transfer.training.state import init_state
      >>> objective = Objective(
      ...     init=lambda key, model: ({"w": jnp.zeros(())}, {}),
      ...     loss=lambda params, aux, views, key: ((params["w"] - 1) ** 2, (aux, {})),
      ...     model=lambda params, aux: {"params": params, "stats": {}},
      ...     views={},
      ... )
      >>> step = make_train_step(objective, optax.sgd(0.5), Preprocessing(image_size=4), num_classes={})
      >>> state = init_state(objective, optax.sgd(0.5), seed=0)
      >>> 0 < train_step_gigaflops(step, state, {}, {}, Preprocessing(image_size=4)) < 1e-6
      True
    """
    batches = {
        name: abstract_batch(preprocessing, size, source.extra, crops_of(views[name]))
        for name, (source, size) in sizes.items()
    }
    return devices.gigaflops(step, state, batches)


def many_steps(step: Callable, fetch: Callable, mesh: Mesh):
    """Compiles `count` training steps into one call on a mesh.

    The state is donated and replicated on every device.

    Args:
      step: result of `make_train_step`.
      fetch: fetch(held, item) -> the batches of one step, see `data.batches`.
      mesh: the batches are split over its `data` axis.

    Returns:
      run(state, held, items, count) -> (state, metrics [count]); the leaves of `items` have the shape [count, ...].

    Example:
      >>> import jax.numpy as jnp
      >>> step = lambda state, batch: (state + batch.sum(), {"loss": state})
      >>> run = many_steps(step, lambda held, index: held[index], devices.make_mesh())
      >>> state, metrics = run(jnp.zeros(()), jnp.ones((3, 8)), jnp.arange(3), 3)
      >>> float(state), metrics["loss"].tolist()
      (24.0, [0.0, 8.0, 16.0])
    """
    replicated = devices.replicated(mesh)
    out_shardings = (replicated, replicated)
    return jax.jit(_steps(step, fetch, mesh), static_argnums=3, donate_argnums=0, out_shardings=out_shardings)


def many_steps_of_many(step: Callable, fetch: Callable, mesh: Mesh):
    """Compiles `many_steps` for independent states, stacked on a leading axis, one per row of the `sweep` axis.

    Each device runs the program of a single state, so convolutions are never batched over kernels.

    Args:
      step, fetch: as in `many_steps`; all states see the same batches.
      mesh: its `sweep` axis is as long as the number of states.

    Returns:
      run(states, held, items, count) -> (states, metrics [rows, count]).

    Example:
      >>> import jax.numpy as jnp
      >>> step = lambda state, batch: (state + batch.sum(), {"loss": state})
      >>> run = many_steps_of_many(step, lambda held, index: held[index], devices.make_mesh(sweep=1))
      >>> states, metrics = run(jnp.zeros(1), jnp.ones((3, 8)), jnp.arange(3), 3)
      >>> states.tolist(), metrics["loss"].tolist()
      ([24.0], [[0.0, 8.0, 16.0]])
    """

    @functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
    def run(states, held, items, count):
        def run_one(states, held, items):
            state, metrics = _steps(step, fetch, None)(_first(states), held, items, count)
            return _with_axis(state), _with_axis(metrics)

        specs = (PartitionSpec("sweep"), PartitionSpec(), PartitionSpec())
        mapped = jax.shard_map(
            run_one,
            mesh=mesh,
            in_specs=specs,
            out_specs=(PartitionSpec("sweep"), PartitionSpec("sweep")),
            check_vma=False,
        )
        return mapped(states, held, items)

    return run


def _steps(step: Callable, fetch: Callable, mesh: Mesh | None) -> Callable:
    """Returns run(state, held, items, count), which fetches the batches of each item and runs the steps in order."""

    step_on_mesh = step if mesh is None else devices.on_mesh(step, mesh)

    def run(state, held, items, count):
        def body(state, item):
            batches = fetch(held, item)
            if mesh is not None:
                batches = devices.constrain(batches, mesh, "data")
            return step_on_mesh(state, batches)

        if count == 1:  # without a loop, see devices.steps_per_call
            state, metrics = body(state, _first(items))
            return state, _with_axis(metrics)
        return jax.lax.scan(body, state, items, length=count)

    return run


def _first(tree):
    """Removes a leading axis of length 1 from every leaf."""
    return jax.tree.map(lambda x: x[0], tree)


def _with_axis(tree):
    """Adds a leading axis to every leaf."""
    return jax.tree.map(lambda x: x[None], tree)
