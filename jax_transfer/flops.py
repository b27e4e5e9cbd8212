"""Operation counts of computations with loops and factorisations, counted while they run.

The compiler's cost analysis (`devices.gigaflops`) is accurate for straight-line programs such as a forward pass. But it
counts the body of a loop only once and a library call (QR, SVD, Cholesky) as zero, and so misses nearly all the work of
EM or L-BFGS. Here the traced program runs with an additional counter, so that every iteration of a loop is counted.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

# Primitives without arithmetic: they only move or rename values.
_FREE = {
    *(
        "reshape",
        "broadcast_in_dim",
        "transpose",
        "squeeze",
        "slice",
        "dynamic_slice",
        "dynamic_update_slice",
        "gather",
    ),
    *("concatenate", "pad", "rev", "iota", "copy", "copy_p", "split", "select_n", "convert_element_type"),
    *("bitcast_convert_type", "stop_gradient", "device_put", "sharding_constraint", "optimization_barrier"),
    *("random_wrap", "random_unwrap", "random_seed"),
}


def gigaflops(function, *args) -> float:
    """Returns the floating-point operations / 1e9 of `function(*args)`, which is compiled and run once.

    Matrix products and convolutions count 2 for each multiply-add. Reductions count 1 for each element of the operand,
    and other operations 1 for each element of the result. Factorisations count as in Golub and Van Loan, "Matrix
    Computations" (4th edition, sections 4.2, 5.2 and 8.6), for the factors that are computed.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.eye(100)
    >>> round(gigaflops(lambda x: jax.lax.fori_loop(0, 5, lambda i, y: y @ x, x), x), 3)
    0.01
    """
    return counter(function)(*args)


def counter(function) -> Callable[..., float]:
    """Returns a function of the same arguments that counts like `gigaflops`, compiled once for arguments of one shape.

    >>> import jax.numpy as jnp
    >>> count = counter(lambda x: x @ x)
    >>> round(count(jnp.eye(100)), 3), round(count(jnp.eye(200)), 3)
    (0.002, 0.016)
    """

    @jax.jit
    def count(*args):
        closed = jax.make_jaxpr(function)(*args)
        return _run(closed.jaxpr, closed.consts, jax.tree.leaves(args))[1]

    return lambda *args: float(count(*args)) / 1e9


def _run(jaxpr, consts, args):
    """Returns the outputs of a jaxpr and the number of operations that they took, both traced."""
    values, count = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True)), jnp.float32(0)
    for eqn in jaxpr.eqns:
        inputs = [v.val if isinstance(v, core.Literal) else values[v] for v in eqn.invars]
        outputs, operations = _apply(eqn, inputs)
        values.update(zip(eqn.outvars, outputs, strict=True))
        count += operations
    return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars], count


def _apply(eqn, args):
    """Returns the outputs of one equation of a jaxpr and the number of operations that they took."""
    name, params = eqn.primitive.name, eqn.params
    if name == "while":
        return _while(params, args)
    if name == "scan":
        return _scan(eqn, args)
    if name == "cond":
        branches = [lambda *a, branch=branch: _run(branch.jaxpr, branch.consts, a) for branch in params["branches"]]
        return jax.lax.switch(args[0], branches, *args[1:])
    inner = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call") if key in params), None)
    if inner is not None:
        return _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), args)  # a ClosedJaxpr or a Jaxpr
    outputs = eqn.primitive.bind(*args, **params)
    return outputs if eqn.primitive.multiple_results else [outputs], float(_operations(eqn))


def _while(params, args):
    cond_n, body_n = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, carry = args[:cond_n], args[cond_n : cond_n + body_n], args[cond_n + body_n :]
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]

    def run_cond(state):
        carry, _ = state
        (keep_running,), _ = _run(cond.jaxpr, cond.consts, [*cond_consts, *carry])
        return keep_running

    def run_body(state):
        carry, count = state
        outputs, operations = _run(body.jaxpr, body.consts, [*body_consts, *carry])
        return outputs, count + operations

    return jax.lax.while_loop(run_cond, run_body, (list(carry), jnp.float32(0)))


def _scan(eqn, args):
    body, params = eqn.params["jaxpr"], eqn.params
    # These numbers are derived from ranks, because the parameters that hold them have other names in other versions of
    # JAX: an array that is scanned over has one more axis outside the body than inside.
    carry_n = sum(a.aval.ndim == b.aval.ndim for a, b in zip(eqn.outvars, body.jaxpr.outvars, strict=True))
    xs_n = sum(a.aval.ndim != b.aval.ndim for a, b in zip(eqn.invars, body.jaxpr.invars, strict=True))
    consts_n = len(args) - carry_n - xs_n
    consts, carry, xs = args[:consts_n], args[consts_n : consts_n + carry_n], args[consts_n + carry_n :]

    def run_body(state, x):
        carry, count = state
        outputs, operations = _run(body.jaxpr, body.consts, [*consts, *carry, *x])
        return (outputs[:carry_n], count + operations), outputs[carry_n:]

    start = (list(carry), jnp.float32(0))
    (carry, count), ys = jax.lax.scan(run_body, start, list(xs), length=params["length"], reverse=params["reverse"])
    return [*carry, *ys], count


def _operations(eqn) -> float:
    """Returns the number of operations in one call of a primitive, computed from the shapes."""
    name, params = eqn.primitive.name, eqn.params
    result = eqn.outvars[0].aval
    operand: Any = eqn.invars[0].aval if eqn.invars else None
    if name in _FREE or not hasattr(result, "shape"):
        return 0
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * result.size * math.prod(operand.shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        outputs_axis = params["dimension_numbers"].rhs_spec[0]
        return 2 * result.size * kernel.size / kernel.shape[outputs_axis]
    if name in _FACTORISATIONS:
        *batch, m, n = operand.shape
        return math.prod(batch) * _FACTORISATIONS[name](max(m, n), min(m, n), eqn)
    if name == "triangular_solve":
        return result.size * operand.shape[-1]
    if name == "sort":
        return operand.size * math.log2(max(operand.size, 2))
    return max(result.size, operand.size if name.startswith(("reduce", "arg", "cum")) and operand is not None else 0)


def _qr(m, n, eqn):
    return 2 * n**2 * (m - n / 3)


def _svd(m, n, eqn):
    return 14 * m * n**2 + 8 * n**3 if eqn.params.get("compute_uv") else 4 * m * n**2 - 4 / 3 * n**3


# Primitive -> number of operations for a matrix with long side m and short side n.
_FACTORISATIONS = {
    "cholesky": lambda m, n, eqn: n**3 / 3,
    "eigh": lambda m, n, eqn: 9 * n**3,
    "geqrf": _qr,
    "qr": _qr,
    "householder_product": _qr,
    "lu": lambda m, n, eqn: n**2 * (m - n / 3),
    "svd": _svd,
}
