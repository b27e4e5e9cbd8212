"""Released files of all families, with the names, shapes and extras of the original, are read and exported."""

import dataclasses
import json
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from helpers.conv_checks import apply, random_images, short_inception_resnet_v2
from helpers.images import torchvision_crop
from jax_transfer.checkpoints import export, load_checkpoint
from jax_transfer.data.augment import evaluation_view
from jax_transfer.data.transforms import Preprocessing, resize_square
from jax_transfer.models import MODELS

torch = pytest.importorskip("torch")
from helpers import torch_twins  # noqa: E402
from helpers import torch_twins_conv as conv  # noqa: E402
from helpers import torch_twins_inception as inception  # noqa: E402
from helpers import torch_twins_vit as vit  # noqa: E402


def moco_v2(state):
    """Returns a MoCo v2 state with an MLP head, a second encoder and a queue, below the wrapper for several GPUs."""
    trunk = {name: x for name, x in state.items() if not name.startswith("fc.")}
    head = {"fc.0.weight": (256, 256), "fc.0.bias": (256,), "fc.2.weight": (128, 256), "fc.2.bias": (128,)}
    encoder = trunk | {name: torch.ones(shape) for name, shape in head.items()}
    return {
        **{f"module.encoder_q.{name}": x for name, x in encoder.items()},
        **{f"module.encoder_k.{name}": torch.zeros_like(x) for name, x in encoder.items()},
        "module.queue": torch.ones(128, 64),
        "module.queue_ptr": torch.zeros(1, dtype=torch.int64),
    }


def with_auxiliary_heads(state):
    """Adds the heads that Inception nets have only in training."""
    names = ("aux1.conv.conv.weight", "aux2.fc2.bias", "AuxLogits.fc.weight")
    return state | {name: torch.ones(3, 2) for name in names}


def with_caffe_shapes(state):
    """Returns BatchNorm arrays as [1, d], as in the file that pretrainedmodels published."""
    return {name: x[None] if "_bn." in name and x.ndim == 1 else x for name, x in state.items()}


def with_small_keys(twin):
    """Scales keys and queries down, so that their kernel exp(-|k|^2 / 2) does not vanish."""
    with torch.no_grad():
        for attention in (twin.tokens_to_token.attention1, twin.tokens_to_token.attention2):
            attention.kqv.weight[:128] *= 0.15
            attention.kqv.bias[:128] *= 0.15
    return twin


class Case(NamedTuple):
    model: str
    file: str
    size: int
    twin: Callable
    settings: dict | None = None  # metadata of the file
    change: Callable = dict  # state_dict -> contents of the file
    bgr: bool = False
    exports: Callable | None = None  # a twin with the names that `export` writes, if they differ


TINY = (192, 12, 3, 16, 32, 5)
CASES = (
    Case(
        "resnet10", "resnet10_mine.safetensors", 16,
        lambda: torch_twins.random_resnet(torch_twins.BasicBlock, (1, 1, 1, 1), 5, 8, "cifar"),
    ),
    Case(
        "resnet18", "resnet18-f37072fd.pth", 64,
        lambda: torch_twins.random_resnet(torch_twins.BasicBlock, (2, 2, 2, 2), 5, 8, "imagenet"),
    ),
    Case(
        "resnet50", "moco_v2_800ep_pretrain.pth.tar", 64,
        lambda: torch_twins.random_resnet(torch_twins.Bottleneck, (3, 4, 6, 3), 5, 8, "imagenet"), change=moco_v2,
    ),
    Case(
        "resnet18_v2", "resnetv2_18.ra4_e3600_r224_in1k/model.safetensors", 64,
        lambda: conv.randomised(conv.ResNetV2(False, (2, 2, 2, 2), 5, 8, "imagenet", conv_head=True)),
    ),
    Case(
        "resnet50_v2", "resnetv2_50.a1h_in1k.safetensors", 16,
        lambda: conv.randomised(conv.ResNetV2(True, (3, 4, 6, 3), 5, 8, "cifar", conv_head=True)),
    ),
    Case("mobilenet_v1", "mobilenetv1_100.pth", 64, lambda: conv.randomised(conv.MobileNetV1(5, 1.0))),
    Case(
        "mobilenet_v2", "mobilenet_v2-b0353104.pth", 64, lambda: conv.randomised(conv.MobileNetV2(5, 1.0)),
        exports=lambda: conv.TimmMobileNetV2(5),
    ),
    Case("mobilenet_v2", "mobilenetv2_100_ra.safetensors", 64, lambda: conv.randomised(conv.TimmMobileNetV2(5))),
    Case(
        "inception_v1", "googlenet-1378be20.safetensors", 52, lambda: conv.randomised(inception.GoogLeNet(5, 0.1)),
        {"width": 0.1}, with_auxiliary_heads,
    ),
    Case(
        "inception_v2", "bn_inception-52deb4733.safetensors", 64,
        lambda: conv.randomised(inception.BNInception(5, 0.1)), {"width": 0.1}, with_caffe_shapes, bgr=True,
    ),
    Case(
        "inception_v3", "inception_v3_google-0cc3c7bd.safetensors", 75,
        lambda: conv.randomised(inception.Inception3(5, 0.1)), {"width": 0.1}, with_auxiliary_heads,
    ),
    Case(
        "inception_v4", "inceptionv4-8e4777a0.safetensors", 75,
        lambda: conv.randomised(inception.InceptionV4(5, 0.1)), {"width": 0.1},
    ),
    Case(
        "vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors", 32,
        lambda: vit.random(vit.VisionTransformer(*TINY)),
    ),
    Case(
        "deit_tiny_patch16_224", "deit_tiny_patch16_224-a1311bcf.pth", 32,
        lambda: vit.random(vit.VisionTransformer(*TINY)), change=lambda state: {"model": state},
    ),
    Case(
        "t2t_vit_14", "81.5_T2T_ViT_14.pth.tar", 32,
        lambda: with_small_keys(vit.random(vit.T2TViT(vit.TokenPerformer, 384, 14, 6, 64, 32, 5))),
        change=lambda state: {"state_dict": {}, "state_dict_ema": state},
    ),
    Case(
        "t2t_vit_t_14", "81.7_T2T_ViTt_14.safetensors", 32,
        lambda: vit.random(vit.T2TViT(vit.TokenTransformer, 384, 14, 6, 64, 32, 5)),
    ),
)  # fmt: skip
DEEP = Case(
    "inception_resnet_v2",
    "inception_resnet_v2-940b1cd6.safetensors",
    75,
    lambda: conv.randomised(inception.InceptionResnetV2(5, 0.1)),
    {"width": 0.1},
)


def write(path, state, settings=None, model=""):
    path.parent.mkdir(exist_ok=True)
    if path.suffix != ".safetensors":
        if any("encoder_q" in name for name in state):
            state = {"epoch": 800, "arch": "resnet50", "state_dict": state}
        torch.save(state, path)
        return
    metadata = {"jax_transfer": json.dumps({"model": {"name": model, **settings}})} if settings else {"format": "pt"}
    safetensors.numpy.save_file({name: x.numpy() for name, x in state.items()}, path, metadata)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.std())


def shapes(state):
    skipped = ("num_batches_tracked", "aux1", "aux2", "AuxLogits")
    return {name: tuple(x.shape) for name, x in state.items() if not any(word in name for word in skipped)}


@pytest.mark.parametrize("case", (*CASES, pytest.param(DEEP, marks=pytest.mark.slow)), ids=lambda case: case.file)
def test_a_released_file_equals_its_twin_and_is_exported(tmp_path, case):
    twin, images = case.twin(), random_images(case.size, count=2)
    write(tmp_path / case.file, case.change(twin.state_dict()), case.settings, case.model)
    checkpoint = load_checkpoint(tmp_path / case.file)
    assert checkpoint.net.name == case.model
    output = apply(checkpoint.net, checkpoint.params, checkpoint.stats, images)
    logits, features = torch_twins.twin_output(twin, images[..., ::-1] if case.bgr else images)
    assert_close(output.features, features)
    contrastive = case.change is moco_v2
    assert checkpoint.has_head != contrastive and checkpoint.net.num_classes == (1000 if contrastive else 5)
    if not contrastive:
        assert_close(output.logits, logits)

    export(checkpoint, tmp_path / "written.safetensors")
    written = safetensors.numpy.load_file(tmp_path / "written.safetensors")
    expected = shapes((case.exports() if case.exports else twin).state_dict())
    if contrastive:
        expected = {name: shape for name, shape in expected.items() if not name.startswith("fc.")}
    assert shapes(written) == expected
    if not case.exports and not contrastive:
        for name, tensor in twin.state_dict().items():
            if name in written:
                np.testing.assert_array_equal(written[name], tensor)
    again = load_checkpoint(tmp_path / "written.safetensors")
    assert again.net is checkpoint.net and again.has_head == checkpoint.has_head
    jax.tree.map(np.testing.assert_array_equal, (again.params, again.stats), (checkpoint.params, checkpoint.stats))


def test_a_short_inception_resnet_v2_equals_its_twin(tmp_path, monkeypatch):
    spec = dataclasses.replace(MODELS["inception_resnet_v2"], make=short_inception_resnet_v2)
    monkeypatch.setitem(MODELS, "inception_resnet_v2", spec)
    twin = lambda: conv.randomised(inception.InceptionResnetV2(5, 0.1, repeats=(1, 1, 1)))  # noqa: E731
    test_a_released_file_equals_its_twin_and_is_exported(tmp_path, DEEP._replace(twin=twin))


def test_torchvisions_vit_equals_its_twin_and_is_exported(tmp_path):
    twin, images = vit.random(vit.TorchvisionViT(*TINY)), random_images(32, count=2)
    write(tmp_path / "vit_ti_16.pth", twin.state_dict())
    checkpoint = load_checkpoint(tmp_path / "vit_ti_16.pth", model="vit_tiny_patch16_224")
    output = apply(checkpoint.net, checkpoint.params, checkpoint.stats, images)
    logits, features = torch_twins.twin_output(twin, images)
    assert_close(output.features, features)
    assert_close(output.logits, logits)
    export(checkpoint, tmp_path / "written.safetensors")
    written = safetensors.numpy.load_file(tmp_path / "written.safetensors")
    assert shapes(written) == shapes(vit.VisionTransformer(*TINY).state_dict())


def test_a_contrastive_linear_head_is_not_a_classifier(tmp_path):
    twin = torch_twins.random_resnet(torch_twins.BasicBlock, (1, 1, 1, 1), 128, 8, "imagenet")
    state = {f"module.encoder_q.{name}": x for name, x in twin.state_dict().items()}
    write(tmp_path / "resnet10.pth", state)
    checkpoint = load_checkpoint(tmp_path / "resnet10.pth")
    assert not checkpoint.has_head and checkpoint.net.num_classes == 1000


FULL_SIZE = {
    "resnet50": lambda: torch_twins.random_resnet(torch_twins.Bottleneck, (3, 4, 6, 3), 1000, 64, "imagenet"),
    "vit_base_patch16_224": lambda: vit.random(vit.VisionTransformer(768, 12, 12, 16, 224, 1000)),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_file_equals_its_twin(tmp_path, name):
    twin, images = FULL_SIZE[name](), random_images(224, count=1)
    write(tmp_path / f"{name}.safetensors", twin.state_dict())
    checkpoint = load_checkpoint(tmp_path / f"{name}.safetensors")
    assert checkpoint.net is MODELS[name](num_classes=1000)
    output = apply(checkpoint.net, checkpoint.params, checkpoint.stats, images)
    logits, features = torch_twins.twin_output(twin, images)
    assert_close(output.features, features)
    assert_close(output.logits, logits)


# --- from a photo to the logits


@pytest.mark.parametrize("shape", [(375, 500), (500, 333)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_photo_gives_the_logits_of_torchvisions_transforms(tmp_path, shape, interpolation):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(shape[::-1])
    photo = np.clip(np.asarray(coarse, np.int16) + rng.integers(-20, 21, (*shape, 3)), 0, 255).astype(np.uint8)
    preprocessing = Preprocessing(56, 56 / 64, interpolation=interpolation)
    resized = resize_square(photo, preprocessing.host_size, interpolation)
    found = np.asarray(evaluation_view(resized[None], preprocessing))
    resampling = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    cropped = torchvision_crop(Image.fromarray(photo), 64, 56, resampling)
    expected = (np.float32(cropped) / 255 - np.float32(mean)) / np.float32(std)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)

    # Resizing of tensors in torch agrees, except that PIL rounds to integers after each direction.
    height, width = (int(64 * n / min(shape)) for n in shape)
    tensor = torch.from_numpy(photo.transpose(2, 0, 1)[None].astype(np.float32))
    resized = torch.nn.functional.interpolate(tensor, size=(height, width), mode=interpolation, antialias=True)
    top, left = round((height - 56) / 2), round((width - 56) / 2)
    cut = resized[0, :, top : top + 56, left : left + 56].permute(1, 2, 0).clamp(0, 255).numpy()
    np.testing.assert_allclose(found[0] * std + mean, cut / 255, atol=1.5 / 255)

    twin = torch_twins.random_resnet(torch_twins.BasicBlock, (1, 1, 1, 1), 5, 8, "imagenet")
    write(tmp_path / "resnet10.safetensors", twin.state_dict())
    checkpoint = load_checkpoint(tmp_path / "resnet10.safetensors")
    logits, _ = torch_twins.twin_output(twin, expected[None])
    assert_close(apply(checkpoint.net, checkpoint.params, checkpoint.stats, found).logits, logits)
