"""The training state: one tree of arrays from which training resumes with bitwise identical results.

It holds "params" (everything trained by gradients), "aux" (everything that changes by other means, see `Objective`),
"opt_state", "step" and "key". With a moving average it also holds "ema", {"params", "stats"}: the model that is then
evaluated and transferred.
"""

import jax
import jax.numpy as jnp
import optax

from jax_transfer.training.objectives import Objective


def init_state(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    seed: int,
    model: dict | None = None,
    ema: bool = False,
) -> dict:
    """Makes the state at step 0.

    Args:
      objective: initialises params and aux.
      optimizer: initialises opt_state.
      seed: seed of the initialisation and of the training.
      model: {"params", "stats"} to start from, or None for a new initialisation.
      ema: whether to keep a moving average of the model; its initial value is the model.

    Example:
      >>> objective = Objective(
      ...     init=lambda key, model: ({"w": jnp.ones(2)}, {"queue": jnp.zeros(3)}),
      ...     loss=None,
      ...     model=lambda params, aux: {"params": params, "stats": {}},
      ...     views={},
      ... )
      >>> sorted(init_state(objective, optax.sgd(0.1), seed=0))
      ['aux', 'key', 'opt_state', 'params', 'step']
    """
    params, aux = objective.init(jax.random.key(seed), model)
    average = {"ema": objective.model(params, aux)} if ema else {}
    # Copied, since the training step donates every array of the state, and an array can be donated only once.
    copied = jax.tree.map(jnp.copy, {"aux": aux, **average})
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
        "key": jax.random.key_data(jax.random.key(seed)),
        **copied,
    }


def evaluated(objective: Objective, state: dict) -> dict:
    """Returns the model {"params", "stats"} to evaluate: the moving average if there is one.

    Example:
      >>> objective = Objective(
      ...     init=lambda key, model: ({"w": jnp.ones(2)}, {"queue": jnp.zeros(3)}),
      ...     loss=None,
      ...     model=lambda params, aux: {"params": params, "stats": {}},
      ...     views={},
      ... )
      >>> evaluated(objective, init_state(objective, optax.sgd(0.1), seed=0))["params"]["w"].tolist()
      [1.0, 1.0]
    """
    return state["ema"] if "ema" in state else objective.model(state["params"], state["aux"])


def divide(objective: Objective, state: dict) -> tuple[dict, dict]:
    """Splits a state for storage into (the model to evaluate, everything else needed to resume).

    It works on arrays and on their abstract shapes. The second tree holds the entries of `aux` at its top level, which
    is the format of states stored before `aux` existed.

    Raises:
      ValueError: if the objective's `model` computes arrays instead of selecting them, or an entry of aux has the name
        of another part of the state.

    Example:
      >>> objective = Objective(
      ...     init=lambda key, model: ({"w": jnp.ones(2)}, {"queue": jnp.zeros(3)}),
      ...     loss=None,
      ...     model=lambda params, aux: {"params": params, "stats": {}},
      ...     views={},
      ... )
      >>> model, rest = divide(objective, init_state(objective, optax.sgd(0.1), seed=0))
      >>> sorted(model["params"]), sorted(rest)
      (['w'], ['key', 'queue', 'step'])
    """
    model = evaluated(objective, state)
    rest = {name: part for name, part in state.items() if name != "aux"}
    if taken := rest.keys() & state["aux"].keys():
        raise ValueError(
            f"an objective's aux must not hold {', '.join(sorted(taken))}: use another name for the entry."
        )
    in_model, in_state = (set(map(id, jax.tree.leaves(tree))) for tree in (model, state))
    if not in_model <= in_state:
        raise ValueError("an objective's model must select leaves of params and aux, not compute new ones.")
    return model, _without({**rest, **state["aux"]}, in_model)


def join(objective: Objective, state: dict, model: dict, training: dict) -> dict:
    """Inverts `divide`: puts the arrays of both trees into the structure of `state`.

    Args:
      objective: as in `divide`.
      state: a state of the same structure; its leaves may be abstract and are replaced.
      model: the first result of `divide`.
      training: the second result of `divide`.

    Example:
      >>> objective = Objective(
      ...     init=lambda key, model: ({"w": jnp.ones(2)}, {"queue": jnp.zeros(3)}),
      ...     loss=None,
      ...     model=lambda params, aux: {"params": params, "stats": {}},
      ...     views={},
      ... )
      >>> state = init_state(objective, optax.sgd(0.1), seed=0)
      >>> sorted(join(objective, state, *divide(objective, state))) == sorted(state)
      True
    """
    replacement = {}
    for abstract, tree in zip(divide(objective, state), (model, training), strict=True):
        replacement |= dict(zip(map(id, jax.tree.leaves(abstract)), jax.tree.leaves(tree), strict=True))
    return jax.tree.map(lambda leaf: replacement[id(leaf)], state)


def _without(tree, ids: set[int]):
    """Removes the leaves with these ids, and dictionaries that become empty, from a nested dictionary."""
    if not isinstance(tree, dict):
        return tree
    kept = {name: _without(part, ids) for name, part in tree.items() if id(part) not in ids}
    return {name: part for name, part in kept.items() if jax.tree.leaves(part)}
