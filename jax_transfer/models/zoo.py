"""The models by name."""

from jax_transfer.models import (
    inception,
    inception_resnet_v2,
    inception_v3,
    inception_v4,
    mobilenet,
    resnet,
    resnet_v2,
    t2t_vit,
    vit,
)
from jax_transfer.models.spec import Spec

# Name of a model -> the Spec that makes it: `MODELS["resnet18"](num_classes=10, width=8) -> Net`, see `Spec` and `Net`.
MODELS: dict[str, Spec] = {
    "resnet10": resnet.resnet10,
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnet152": resnet.resnet152,
    "resnet18_v2": resnet_v2.resnet18_v2,
    "resnet34_v2": resnet_v2.resnet34_v2,
    "resnet50_v2": resnet_v2.resnet50_v2,
    "resnet101_v2": resnet_v2.resnet101_v2,
    "resnet152_v2": resnet_v2.resnet152_v2,
    "mobilenet_v1": mobilenet.mobilenet_v1,
    "mobilenet_v2": mobilenet.mobilenet_v2,
    "inception_v1": inception.inception_v1,
    "inception_v2": inception.inception_v2,
    "inception_v3": inception_v3.inception_v3,
    "inception_v4": inception_v4.inception_v4,
    "inception_resnet_v2": inception_resnet_v2.inception_resnet_v2,
    "vit_tiny_patch4_32": vit.vit_tiny_patch4_32,
    "vit_tiny_patch8_64": vit.vit_tiny_patch8_64,
    "vit_tiny_patch16_224": vit.vit_tiny_patch16_224,
    "vit_small_patch16_224": vit.vit_small_patch16_224,
    "vit_base_patch16_224": vit.vit_base_patch16_224,
    "vit_base_patch32_224": vit.vit_base_patch32_224,
    "deit_tiny_patch16_224": vit.deit_tiny_patch16_224,
    "deit_small_patch16_224": vit.deit_small_patch16_224,
    "deit_base_patch16_224": vit.deit_base_patch16_224,
    "t2t_vit_14": t2t_vit.t2t_vit_14,
    "t2t_vit_t_14": t2t_vit.t2t_vit_t_14,
}
