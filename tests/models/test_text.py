"""The text tower: equal to a torch twin, causal, and blind to what follows the end of a caption."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_transfer.models.text import text_tower
from jax_transfer.records import InputError

SIZE = {"vocabulary_size": 40, "context_length": 9, "embedding_dim": 6, "width": 16, "layers": 2, "heads": 4}


@pytest.fixture(scope="module")
def tower():
    return text_tower(**SIZE)


@pytest.fixture(scope="module")
def params(tower):
    """Weights far from their initial values, so that every one of them matters."""
    start, _ = tower.init(jax.random.key(0))
    leaves, structure = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


TOKENS = np.array([[1, 7, 9, 2, 0, 0, 0, 0, 0], [1, 30, 31, 32, 33, 34, 35, 36, 2], [1, 2, 0, 0, 0, 0, 0, 0, 0]])


def torch_twin(params, tokens):
    """Computes the embeddings with torch's own transformer layers."""
    torch = pytest.importorskip("torch")
    tensor = lambda x: torch.tensor(np.array(x))  # noqa: E731
    x = tensor(params["token_embed"])[torch.tensor(tokens)] + tensor(params["pos_embed"])
    mask = torch.nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
    for i in range(SIZE["layers"]):
        block = params["blocks"][str(i)]
        layer = torch.nn.TransformerEncoderLayer(
            SIZE["width"], SIZE["heads"], 4 * SIZE["width"], 0.0, "gelu", batch_first=True, norm_first=True
        )
        linear = lambda p: {"weight": tensor(p["kernel"]).T, "bias": tensor(p["bias"])}  # noqa: E731
        norm = lambda p: {"weight": tensor(p["scale"]), "bias": tensor(p["bias"])}  # noqa: E731
        qkv = linear(block["attn"]["qkv"])
        parts = {
            "self_attn.out_proj": linear(block["attn"]["proj"]),
            "linear1": linear(block["mlp"]["fc1"]),
            "linear2": linear(block["mlp"]["fc2"]),
            "norm1": norm(block["norm1"]),
            "norm2": norm(block["norm2"]),
        }
        state = {f"{name}.{kind}": value for name, part in parts.items() for kind, value in part.items()}
        layer.load_state_dict(
            {**state, "self_attn.in_proj_weight": qkv["weight"], "self_attn.in_proj_bias": qkv["bias"]}
        )
        x = layer.eval()(x, src_mask=mask, is_causal=True)
    ends = x[torch.arange(len(tokens)), torch.tensor((tokens == 2).argmax(1))]
    final = params["norm"]
    ends = torch.nn.functional.layer_norm(ends, (SIZE["width"],), tensor(final["scale"]), tensor(final["bias"]))
    return (ends @ tensor(params["projection"])).detach().numpy()


def test_equals_torch(tower, params):
    np.testing.assert_allclose(tower.apply(params, {}, TOKENS), torch_twin(params, TOKENS), atol=2e-5)


def test_training_equals_evaluation_and_there_are_no_statistics(tower, params):
    trained, stats = tower.apply_train(params, {}, TOKENS, jax.random.key(0))
    np.testing.assert_allclose(trained, tower.apply(params, {}, TOKENS), atol=1e-6)
    assert stats == {} and trained.shape == (3, SIZE["embedding_dim"]) and trained.dtype == jnp.float32


def test_padding_and_what_follows_the_end_change_nothing(tower, params):
    """A longer context, and a shorter row of tokens, give the same embeddings: each token sees only those before it."""
    longer = text_tower(**{**SIZE, "context_length": 12})
    more = {**params, "pos_embed": jnp.concatenate([params["pos_embed"], jnp.full((3, SIZE["width"]), 5.0)])}
    expected = tower.apply(params, {}, TOKENS)
    np.testing.assert_allclose(longer.apply(more, {}, np.pad(TOKENS, ((0, 0), (0, 3)))), expected, atol=1e-5)
    np.testing.assert_allclose(tower.apply(params, {}, TOKENS[[0, 2], :4]), expected[np.array([0, 2])], atol=1e-5)


def test_equal_sizes_give_the_same_functions_and_bfloat16_is_close(tower, params):
    assert text_tower(**SIZE) is tower
    half = text_tower(**SIZE, dtype="bfloat16").apply(params, {}, TOKENS)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, tower.apply(params, {}, TOKENS), atol=0.15)


def test_wrong_sizes_are_refused(tower, params):
    with pytest.raises(InputError, match="captions have 10 tokens, and the text tower has a context of 9"):
        tower.apply(params, {}, jnp.ones((2, 10), int))
    with pytest.raises(InputError, match="width 16 has 3 heads"):
        text_tower(**{**SIZE, "heads": 3})
