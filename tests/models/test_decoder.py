"""The decoders of the autoencoders: transposed convolutions, and a transformer over visible and hidden patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_transfer.models.decoder import decode, new_decoder
from jax_transfer.models.mae_decoder import grid_sinusoids, masked_decoder
from jax_transfer.records import InputError

KEY = jax.random.key(0)


def random_params(params):
    """Adds noise to all parameters, since many of them are 0 or 1 at first."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), jax.device_get(params))


@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_decoded_images_equal_torch(size):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    params = random_params(new_decoder(KEY, code_dim=6, width=4))
    codes = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    tensors = jax.tree.map(torch.tensor, params)
    x = torch.tensor(codes) @ tensors["project"]["kernel"] + tensors["project"]["bias"]
    x = x.reshape(3, 4, 4, 16).permute(0, 3, 1, 2)
    x = functional.interpolate(x, (size[0] // 8, size[1] // 8), mode="bilinear", antialias=True)
    for i in range(3):
        layer = tensors[str(i)]
        norm = layer["norm"]
        x = functional.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], norm["scale"], norm["bias"]).permute(0, 3, 1, 2)
        weight = layer["kernel"].flip(0, 1).permute(2, 3, 0, 1)
        x = functional.conv_transpose2d(functional.relu(x), weight, layer["bias"], stride=2, padding=1)
    images = jax.jit(decode, static_argnums=(2, 3))(params, codes, *size)
    np.testing.assert_allclose(images, x.permute(0, 2, 3, 1), atol=2e-4)


def test_decoded_images_begin_with_the_scale_of_normalised_ones():
    images = decode(new_decoder(KEY, code_dim=64, width=16), jax.random.normal(KEY, (4, 64)), 32, 32)
    assert 0.3 < images.std() < 3


def test_images_that_cannot_be_doubled_thrice_are_refused():
    message = (
        r"^images of 30x30 pixels cannot be decoded: use a preprocessing.image_size that is a multiple of 8, such as"
    )
    with pytest.raises(InputError, match=message + " 32.$"):
        decode({}, jnp.ones((1, 4)), 30, 30)


def test_positions_of_patches_equal_a_loop():
    found = grid_sinusoids(3, 5, 16)
    for row in range(3):
        for column in range(5):
            expected = [
                wave(place * 10_000 ** (-i / 4))
                for place in (column, row)
                for wave in (np.sin, np.cos)
                for i in range(4)
            ]
            np.testing.assert_allclose(found[5 * row + column], expected, rtol=1e-5, atol=1e-6)


def test_masked_decoder_puts_tokens_and_mask_tokens_in_their_places():
    """Without blocks, the prediction for a patch depends on its own token and position alone."""
    decoder = masked_decoder(token_dim=5, grid=(2, 3), outputs=7, width=8, layers=0, heads=2)
    params = random_params(decoder.init(KEY)[0])
    rng = np.random.default_rng(2)
    tokens = rng.normal(size=(4, 1 + 2, 5)).astype(np.float32)
    order = np.array([rng.permutation(6) for _ in range(4)])
    found = decoder.apply(params, {}, (tokens, np.argsort(order, 1)))
    positions = grid_sinusoids(2, 3, 8)
    for i in range(4):
        for place, patch in enumerate(order[i]):
            visible = place < 2
            x = tokens[i, 1 + place] @ params["embed"]["kernel"] + params["embed"]["bias"] if visible else None
            x = (x if visible else params["mask_token"][0, 0]) + positions[patch]
            x = (x - x.mean()) / np.sqrt(x.var() + 1e-6) * params["norm"]["scale"] + params["norm"]["bias"]
            expected = x @ params["pred"]["kernel"] + params["pred"]["bias"]
            np.testing.assert_allclose(found[i, patch], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "heads"), [(16, 3), (18, 3)])
def test_masked_decoder_refuses_widths_that_do_not_divide(width, heads):
    with pytest.raises(
        InputError, match=f"^a decoder of width {width} has 3 heads; expected a width that is a multiple"
    ):
        masked_decoder(token_dim=5, grid=(2, 3), outputs=7, width=width, layers=1, heads=heads)
