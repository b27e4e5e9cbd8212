"""Softmax attention: written out, or by a fused kernel where the platform has one.

The fused kernels never write the n x n weights to memory, which cost gigabytes of traffic a step at the 3,136 tokens of
T2T-ViT's first token layer. A kernel is used for bfloat16, as in training and feature extraction on accelerators;
float32 is always written out, so that its accuracy is the same everywhere. So is a net that is traced outside of
`devices.on_mesh`, as for counting its operations, because the compiler does not see those of a kernel.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as tpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jax_transfer import devices

# The Pallas kernel works on blocks of tokens; with fewer tokens than this, padding costs more than it saves.
FEWEST_TOKENS_ON_TPU = 512


def attention(q, k, v: Float[Array, "b heads n d"], scale: float, causal: bool = False) -> Float[Array, "b heads n d"]:
    """Computes softmax(scale q k^T) v, with the softmax in float32; if `causal`, a token sees none that follows it.

    >>> x = jax.random.normal(jax.random.key(0), (1, 2, 5, 4))
    >>> attention(x, x, x, 0.5).shape
    (1, 2, 5, 4)
    """
    plain, width = functools.partial(written_out, scale=scale, causal=causal), v.shape[-1]
    if v.dtype != jnp.bfloat16 or jax.sharding.get_abstract_mesh().empty:
        return plain(q, k, v)
    kernels = {}
    if v.shape[2] >= FEWEST_TOKENS_ON_TPU:
        kernels["tpu"] = functools.partial(on_tpu, scale=scale, causal=causal)
    if devices.has_cudnn_attention() and width % 8 == 0 and width <= 128:
        kernels["cuda"] = functools.partial(on_gpu, scale=scale, causal=causal)
    return jax.lax.platform_dependent(q, k, v, default=plain, **kernels)


def written_out(
    q, k, v: Float[Array, "b heads n d"], scale: float, causal: bool = False
) -> Float[Array, "b heads n d"]:
    """Computes attention with two matrix products and a softmax.

    The axis of the heads comes before that of the tokens, since other layouts make the products slower on a CPU.
    """
    weights = ((q * scale) @ jnp.swapaxes(k, 2, 3)).astype(jnp.float32)
    if causal:
        weights = jnp.where(jnp.tri(q.shape[2], dtype=bool), weights, -jnp.inf)
    return jax.nn.softmax(weights).astype(v.dtype) @ v


def on_gpu(q, k, v: Float[Array, "b heads n d"], scale: float, causal: bool = False) -> Float[Array, "b heads n d"]:
    """Computes attention with cuDNN's fused kernel, which takes tokens before heads."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    joined = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=causal, implementation="cudnn")
    return jnp.swapaxes(joined, 1, 2)


def on_tpu(q, k, v: Float[Array, "b heads n d"], scale: float, causal: bool = False) -> Float[Array, "b heads n d"]:
    """Computes attention with the Pallas kernel of JAX, on each device for its own images.

    The compiler cannot split a Pallas kernel over devices, so `shard_map` does it, with the mesh of the context (see
    `devices.on_mesh`).
    """
    kernel, mesh = functools.partial(_pallas, scale=scale, causal=causal), jax.sharding.get_abstract_mesh()
    if "data" in mesh.auto_axes:  # not within a `shard_map`, where the work is split already
        kernel = jax.shard_map(kernel, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"), check_vma=False)
    return kernel(q, k, v)


def tokens_on_tpu(n: int) -> tuple[int, int]:
    """Returns the number of tokens after padding, and the tokens in a block of the Pallas kernel.

    A block is a multiple of 128 tokens, and the largest of those that need the least padding.

    >>> tokens_on_tpu(3136), tokens_on_tpu(784)
    ((3200, 640), (896, 896))
    """
    padded = {block: -(-n // block) * block for block in range(128, 1024, 128)}
    block = min(padded, key=lambda block: (padded[block], -block))
    return padded[block], block


def _pallas(q, k, v, scale, causal):
    b, _, n, _ = q.shape
    padded, block = tokens_on_tpu(n)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, padded - n), (0, 0))) for x in (q, k, v))
    real = jnp.broadcast_to(jnp.arange(padded) < n, (b, padded)).astype(jnp.int32)
    # The keys and values of an image stay on the chip while its queries pass, block by block. In the gradients they do
    # not, because the kernels then write arrays of that width for every query.
    sizes = tpu.BlockSizes(
        block_q=block, block_k_major=padded, block_k=block, block_b=1,
        block_k_major_dkv=block, block_k_dkv=block, block_q_major_dkv=block, block_q_dkv=block,
        block_q_dq=block, block_k_major_dq=block, block_k_dq=block,
    )  # fmt: skip
    # Tokens attend only to those of their own segment: real tokens never see padding.
    segments = tpu.SegmentIds(real, real)
    options = {"segment_ids": segments, "sm_scale": scale, "block_sizes": sizes}
    return tpu.flash_attention(q, k, v, causal=causal, **options)[:, :, :n]
