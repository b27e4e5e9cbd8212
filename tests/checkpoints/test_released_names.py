"""Models and preprocessings that belong to the names of released files."""

import numpy as np
import pytest

from jax_transfer.checkpoints.descriptions import released_as
from jax_transfer.checkpoints.released import released, released_preprocessing, releases
from jax_transfer.data.augment import evaluation_view
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import MODELS


@pytest.mark.parametrize(
    ("file", "model"),
    [
        ("resnet50-0676ba61.pth", "resnet50"),
        ("resnet50.a1_in1k/model.safetensors", "resnet50"),
        ("resnet50.a1_in1k/pytorch_model.bin", "resnet50"),
        ("resnet18_v2/epoch_3.pth", None),
        ("resnet50_v2.pth", "resnet50_v2"),
        ("resnetv2_50.a1h_in1k.safetensors", "resnet50_v2"),
        ("resnetv2_50x1_bit.goog_in21k.safetensors", None),
        ("wide_resnet50_2-95faca4d.pth", None),
        ("resnext50_32x4d-7cdf4587.pth", None),
        ("resnet50d_ra2-464e36ba.pth", None),
        ("vit_b_16-c867db91.pth", "vit_base_patch16_224"),
        ("vit_b_32-d86f8d99.pth", "vit_base_patch32_224"),
        ("vit_l_16-852ce7e3.pth", None),
        ("vit_base_patch16_384.pth", "vit_base_patch16_224"),
        ("vit_base_patch16_224.augreg2_in21k_ft_in1k.safetensors", "vit_base_patch16_224"),
        ("deit_small_patch16_224-cd65a155.pth", "deit_small_patch16_224"),
        ("deit_small_distilled_patch16_224-649709d9.pth", None),
        ("mobilenetv2_100_ra-b33bc2c4.pth", "mobilenet_v2"),
        ("mobilenetv2_140_ra-21a4e913.pth", "mobilenet_v2"),
        ("mobilenetv2_110d_ra-77090ade.pth", None),
        ("mobilenetv1_100.ra4_e3600_r224_in1k.safetensors", "mobilenet_v1"),
        ("googlenet-1378be20.pth", "inception_v1"),
        ("bn_inception-52deb4733.pth", "inception_v2"),
        ("inception_v3_google-0cc3c7bd.pth", "inception_v3"),
        ("inceptionv4-8e4777a0.pth", "inception_v4"),
        ("inceptionv4-58153ba9.pth", "inception_v4"),
        ("moco_v2_800ep_pretrain.pth.tar", "resnet50"),
        ("81.5_T2T_ViT_14.pth.tar", "t2t_vit_14"),
        ("81.7_T2T_ViTt_14.pth.tar", "t2t_vit_t_14"),
        ("81.9_T2T_ViT_19.pth.tar", None),
    ],
)
def test_release_names_identify_the_model(tmp_path, file, model):
    assert (released_as(tmp_path / file) or (None,))[0] == model


def test_every_model_has_a_release_of_its_name():
    assert [released(name)[0] for name in MODELS] == list(MODELS)
    assert sum(len(spec.released) for spec in MODELS.values()) == len(releases())  # each name belongs to one model
    for model, preprocessing in releases().values():
        assert preprocessing.image_size % (MODELS[model].patch or 1) == 0


def test_preprocessing_equals_that_of_the_release():
    """Checks the side after resizing (timm rounds it down), the means and the standard deviations."""
    half = (0.5, 0.5, 0.5)
    expected = {
        "resnet50": (224, 256, "bilinear", 0.485),
        "resnet50_v2": (224, 235, "bicubic", 0.5),
        "mobilenet_v1": (224, 256, "bicubic", 0.5),
        "mobilenet_v2": (224, 256, "bilinear", 0.485),
        "inception_v1": (224, 256, "bilinear", 0.5),
        "inception_v2": (224, 256, "bilinear", 128 / 255),
        "inception_v3": (299, 342, "bilinear", 0.5),
        "inception_v4": (299, 341, "bicubic", 0.5),
        "inception_resnet_v2": (299, 333, "bicubic", 0.5),
        "vit_base_patch16_224": (224, 248, "bicubic", 0.5),
        "deit_base_patch16_224": (224, 248, "bicubic", 0.485),
        "t2t_vit_14": (224, 248, "bicubic", 0.485),
    }
    for name, (size, side, interpolation, red) in expected.items():
        found = released_preprocessing(name)
        assert (found.image_size, found.host_size) == (size, side)
        assert (found.interpolation, found.mean[0]) == (interpolation, red)
        assert (found.std == half) == (found.mean == half)
    assert released("resnet50-11ad3fa6.pth")[1].host_size == 232
    assert released("resnet50-0676ba61.pth")[1].host_size == 256
    assert released("inceptionv4-58153ba9.pth")[1].interpolation == "bilinear"  # of pretrainedmodels
    assert released("inceptionv4-8e4777a0.pth")[1].interpolation == "bicubic"  # of timm
    swag, large = released("vit_b_16_swag-9ac1b537.pth")[1], released("vit_base_patch16_384.pth")[1]
    assert (swag.host_size, swag.mean[0], large.host_size, large.mean[0]) == (384, 0.485, 384, 0.5)
    assert released("vit_b_16-c867db91.pth")[1] == Preprocessing(224, 224 / 256)  # torchvision's, not timm's


def test_bn_inception_pixels_are_0_to_255_minus_the_mean():
    images = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    found = evaluation_view(images, released_preprocessing("inception_v2"))
    np.testing.assert_allclose(found, images[:, 16:240, 16:240] - np.array([128.0, 117.0, 104.0]), atol=1e-3)
