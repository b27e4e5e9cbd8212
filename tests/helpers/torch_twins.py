"""A small torch ResNet with torchvision's layout and names, and how to compare with torch nets. Needs torch."""

import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from jax_transfer import trees


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, features_in, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(features_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _downsample(features_in, width, stride)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, features_in, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(features_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _downsample(features_in, 4 * width, stride)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + self.downsample(x))


def _downsample(features_in, features_out, stride):
    if stride == 1 and features_in == features_out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(features_in, features_out, 1, stride, bias=False), nn.BatchNorm2d(features_out))


class ResNet(nn.Module):
    """Maps images [b, 3, h, w] to (logits [b, s], features [b, d])."""

    def __init__(self, block, stage_sizes, num_classes, width=64, stem="imagenet"):
        super().__init__()
        if stem == "imagenet":
            self.conv1, self.maxpool = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)
        else:
            self.conv1, self.maxpool = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        features = width
        for stage, num_blocks in enumerate(stage_sizes):
            blocks = []
            for i in range(num_blocks):
                blocks.append(block(features, width * 2**stage, 2 if stage > 0 and i == 0 else 1))
                features = block.expansion * width * 2**stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(features, num_classes)

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        features = x.mean((2, 3))
        return self.fc(features), features


def random_resnet(block, stage_sizes, num_classes, width, stem, seed=0):
    """Returns a random ResNet in evaluation mode, with random BatchNorm scales, biases and statistics."""
    torch.manual_seed(seed)
    model = ResNet(block, stage_sizes, num_classes, width, stem)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def twin_output(twin, images):
    """Returns (logits [b, s], features [b, d]) of a torch net for images [b, h, w, 3] as NumPy arrays."""
    with torch.no_grad():
        logits, features = twin(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
    return logits.numpy(), features.numpy()


def to_dicts(model):
    """Returns the weights of a torch ResNet as (params, stats)."""
    params, stats = {}, {}
    for name, tensor in model.state_dict().items():
        *parents, leaf = name.split(".")
        value = jnp.asarray(tensor.detach().numpy().copy())
        if leaf in ("running_mean", "running_var"):
            stats["/".join([*parents, leaf.removeprefix("running_")])] = value
        elif leaf == "bias":
            params["/".join([*parents, "bias"])] = value
        elif leaf == "weight":
            kind = {1: "scale", 2: "kernel", 4: "kernel"}[value.ndim]
            params["/".join([*parents, kind])] = jnp.transpose(value, {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[value.ndim])
    return trees.unflatten(params), trees.unflatten(stats)
