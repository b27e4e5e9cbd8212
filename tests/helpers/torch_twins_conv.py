"""Small torch MobileNets and pre-activation ResNets with the names of the released checkpoints. Needs torch.

Each maps images [b, 3, h, w] to (logits [b, s], features [b, d]). `width` multiplies the channels.
"""

import torch
from torch import nn
from torch.nn import functional as F


def randomised(model, seed=0):
    """Returns the model in evaluation mode with random weights, BatchNorm parameters and statistics."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def divisible(features):
    nearest = max(8, int(features + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * features else nearest


class SeparableBlock(nn.Module):
    def __init__(self, features_in, features_out, stride):
        super().__init__()
        self.conv_dw = nn.Conv2d(features_in, features_in, 3, stride, 1, groups=features_in, bias=False)
        self.bn1 = nn.BatchNorm2d(features_in)
        self.conv_pw = nn.Conv2d(features_in, features_out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features_out)

    def forward(self, x):
        return F.relu6(self.bn2(self.conv_pw(F.relu6(self.bn1(self.conv_dw(x))))))


class MobileNetV1(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        features = divisible(32 * width)
        self.conv_stem = nn.Conv2d(3, features, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        stages = []
        for channels in ([64], [128] * 2, [256] * 2, [512] * 6, [1024] * 2):
            stage = nn.Sequential()
            for i, wide in enumerate(channels):
                stage.append(SeparableBlock(features, divisible(wide * width), 2 if i == 0 and wide > 64 else 1))
                features = divisible(wide * width)
            stages.append(stage)
        self.blocks = nn.Sequential(*stages)
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, x):
        features = self.blocks(F.relu6(self.bn1(self.conv_stem(x)))).mean((2, 3))
        return self.classifier(features), features


def conv_bn_relu6(features_in, features_out, size, stride=1, groups=1):
    conv = nn.Conv2d(features_in, features_out, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(features_out), nn.ReLU6())


def padded_as_keras(model):
    """Returns a MobileNet whose strided convolutions pad images of even size as Keras does, with Keras's epsilon."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.padding = (0, 0)
            module.register_forward_pre_hook(lambda _, inputs: F.pad(inputs[0], (0, 1, 0, 1)))
    return model


class InvertedResidual(nn.Module):
    def __init__(self, features_in, features_out, stride, expansion):
        super().__init__()
        inner = features_in * expansion
        layers = [conv_bn_relu6(features_in, inner, 1)] if expansion > 1 else []
        layers += [conv_bn_relu6(inner, inner, 3, stride, groups=inner)]
        layers += [nn.Conv2d(inner, features_out, 1, bias=False), nn.BatchNorm2d(features_out)]
        self.conv = nn.Sequential(*layers)
        self.shortcut = stride == 1 and features_in == features_out

    def forward(self, x):
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        features = divisible(32 * width)
        layers = [conv_bn_relu6(3, features, 3, 2)]
        expansions, repeats, strides = (1, *[6] * 6), (1, 2, 3, 4, 3, 3, 1), (1, 2, 2, 2, 1, 2, 1)
        for t, c, n, s in zip(expansions, (16, 24, 32, 64, 96, 160, 320), repeats, strides, strict=True):
            for stride in [s] + [1] * (n - 1):
                layers.append(InvertedResidual(features, divisible(c * width), stride, t))
                features = divisible(c * width)
        last = divisible(1280 * max(1.0, width))
        self.features = nn.Sequential(*layers, conv_bn_relu6(features, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))

    def forward(self, x):
        features = self.features(x).mean((2, 3))
        return self.classifier(features), features


class TimmInvertedResidual(nn.Module):
    def __init__(self, features_in, features_out, stride):
        super().__init__()
        inner = 6 * features_in
        self.conv_pw = nn.Conv2d(features_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv_dw = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv_pwl = nn.Conv2d(inner, features_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(features_out)
        self.shortcut = stride == 1 and features_in == features_out

    def forward(self, x):
        y = F.relu6(self.bn2(self.conv_dw(F.relu6(self.bn1(self.conv_pw(x))))))
        y = self.bn3(self.conv_pwl(y))
        return x + y if self.shortcut else y


class TimmSeparable(SeparableBlock):
    """The first block, without an activation after the pointwise convolution."""

    def forward(self, x):
        return self.bn2(self.conv_pw(F.relu6(self.bn1(self.conv_dw(x)))))


class TimmMobileNetV2(nn.Module):
    """timm's mobilenetv2_100: the network above under other names."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv_stem, self.bn1 = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        features, stages = 16, [nn.Sequential(TimmSeparable(32, 16, 1))]
        for c, n, s in ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)):
            first, rest = TimmInvertedResidual(features, c, s), [TimmInvertedResidual(c, c, 1) for _ in range(n - 1)]
            stages.append(nn.Sequential(first, *rest))
            features = c
        self.blocks = nn.Sequential(*stages)
        self.conv_head, self.bn2 = nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280)
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, x):
        x = self.blocks(F.relu6(self.bn1(self.conv_stem(x))))
        features = F.relu6(self.bn2(self.conv_head(x))).mean((2, 3))
        return self.classifier(features), features


class PreActBlock(nn.Module):
    """timm's PreActBasic (two convolutions) or PreActBottleneck (three, the second strides)."""

    def __init__(self, features_in, width, stride, bottleneck):
        super().__init__()
        features_out = 4 * width if bottleneck else width
        self.norm1 = nn.BatchNorm2d(features_in)
        self.norm2 = nn.BatchNorm2d(width)
        if bottleneck:
            self.conv1 = nn.Conv2d(features_in, width, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.norm3 = nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width, features_out, 1, bias=False)
        else:
            self.conv1 = nn.Conv2d(features_in, width, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        if stride != 1 or features_in != features_out:
            self.downsample = nn.Module()
            self.downsample.conv = nn.Conv2d(features_in, features_out, 1, stride, bias=False)

    def forward(self, x):
        activated = torch.relu(self.norm1(x))
        y = self.conv2(torch.relu(self.norm2(self.conv1(activated))))
        if hasattr(self, "conv3"):
            y = self.conv3(torch.relu(self.norm3(y)))
        return y + (self.downsample.conv(activated) if hasattr(self, "downsample") else x)


class ResNetV2(nn.Module):
    def __init__(self, bottleneck, stage_sizes, num_classes, width=64, stem="imagenet", conv_head=False):
        super().__init__()
        self.stem, self.head = nn.Module(), nn.Module()
        self.stem.conv = nn.Conv2d(3, width, *((7, 2, 3) if stem == "imagenet" else (3, 1, 1)), bias=False)
        self.pool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        features, stages = width, []
        for stage, num_blocks in enumerate(stage_sizes):
            blocks = nn.Module()
            blocks.blocks = nn.Sequential()
            for i in range(num_blocks):
                wide = width * 2**stage
                blocks.blocks.append(PreActBlock(features, wide, 2 if stage > 0 and i == 0 else 1, bottleneck))
                features = 4 * wide if bottleneck else wide
            stages.append(blocks)
        self.stages = nn.ModuleList(stages)
        self.norm = nn.BatchNorm2d(features)
        # timm has the convolution.
        self.head.fc = nn.Conv2d(features, num_classes, 1) if conv_head else nn.Linear(features, num_classes)

    def forward(self, x):
        x = self.pool(self.stem.conv(x))
        for stage in self.stages:
            x = stage.blocks(x)
        features = torch.relu(self.norm(x)).mean((2, 3))
        pixels = features[:, :, None, None] if isinstance(self.head.fc, nn.Conv2d) else features
        return self.head.fc(pixels).flatten(1), features
