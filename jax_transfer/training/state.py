"""The state of a training: one tree of arrays from which it continues to the same bits.

{"params": all that the gradient trains, "aux": all that changes otherwise (`Objective`), "opt_state", "step", "key"}. With a
moving average it also holds "ema", {"params", "stats"}, and that is the model that is evaluated and transferred.
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
    """The state at step 0.

    Args:
      model: {"params", "stats"} to start from; None for a new initialisation, drawn from `seed`.
      ema: keep a moving average of the model, which begins as the model does.
    """
    params, aux = objective.init(jax.random.key(seed), model)
    average = {"ema": objective.model(params, aux)} if ema else {}
    # Copies, for the step donates every array of the state, and can donate each but once.
    copied = jax.tree.map(jnp.copy, {"aux": aux, **average})
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
        "key": jax.random.key_data(jax.random.key(seed)),
        **copied,
    }


def evaluated(objective: Objective, state: dict) -> dict:
    """{"params", "stats"} of the model that a state stands for: the moving average where there is one."""
    return state["ema"] if "ema" in state else objective.model(state["params"], state["aux"])


def divide(objective: Objective, state: dict) -> tuple[dict, dict]:
    """What a trajectory stores of a state: (the model that is evaluated, all else that training needs to continue).

    Works on arrays and on their abstract shapes. The entries of `aux` stand beside the others in the second tree, as states
    of before there was one are stored.

    Raises:
      ValueError: if the objective's `model` computes arrays rather than selecting them, or an entry of aux has the name of
        another part of the state.
    """
    model = evaluated(objective, state)
    rest = {name: part for name, part in state.items() if name != "aux"}
    if taken := rest.keys() & state["aux"].keys():
        raise ValueError(f"an objective's aux must not hold {', '.join(sorted(taken))}: the state does")
    held, whole = (set(map(id, jax.tree.leaves(tree))) for tree in (model, state))
    if not held <= whole:
        raise ValueError("an objective's model must select leaves of params and aux, not compute them")
    return model, _without({**rest, **state["aux"]}, held)


def join(objective: Objective, state: dict, model: dict, training: dict) -> dict:
    """Undoes `divide`: the arrays of both trees in the structure of an abstract `state`, whose leaves they replace."""
    found = {}
    for like, tree in zip(divide(objective, state), (model, training), strict=True):
        found |= dict(zip(map(id, jax.tree.leaves(like)), jax.tree.leaves(tree), strict=True))
    return jax.tree.map(lambda leaf: found[id(leaf)], state)


def _without(tree, ids: set[int]):
    """A nested dictionary without the leaves that are among `ids`, and without what is empty then."""
    if not isinstance(tree, dict):
        return tree
    kept = {name: _without(part, ids) for name, part in tree.items() if id(part) not in ids}
    return {name: part for name, part in kept.items() if jax.tree.leaves(part)}
