"""Small torch Inception nets with the layout and names of the released checkpoints. Needs torch.

Each maps images [b, 3, h, w] to (logits [b, s], features [b, d]). `width` multiplies the channels, with a
minimum of 16.
"""

import functools

import torch
from torch import nn
from torch.nn import functional as F


def scaled(features, width):
    return max(16, int(features * width))


class BasicConv2d(nn.Module):
    def __init__(self, features_in, features_out, size, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(features_in, features_out, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(features_out, eps=0.001)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))


class Branches(nn.Module):
    """Concatenates named branches on the same input."""

    def __init__(self, **branches):
        super().__init__()
        self.names = list(branches)
        for name, branch in branches.items():
            self.add_module(name, nn.Sequential(*branch) if isinstance(branch, list) else branch)

    def forward(self, x):
        return torch.cat([getattr(self, name)(x) for name in self.names], 1)


class GoogLeNet(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        conv = BasicConv2d

        def block(n, a, b_in, b, c_in, c, d):
            return Branches(
                branch1=conv(n, a, 1),
                branch2=[conv(n, b_in, 1), conv(b_in, b, 3, padding=1)],
                branch3=[conv(n, c_in, 1), conv(c_in, c, 3, padding=1)],
                branch4=[nn.MaxPool2d(3, 1, 1, ceil_mode=True), conv(n, d, 1)],
            )

        self.conv1 = conv(3, scaled(64, width), 7, 2, 3)
        self.conv2 = conv(scaled(64, width), scaled(64, width), 1)
        self.conv3 = conv(scaled(64, width), scaled(192, width), 3, padding=1)
        features = scaled(192, width)
        for name, channels in (
            ("3a", (64, 96, 128, 16, 32, 32)),
            ("3b", (128, 128, 192, 32, 96, 64)),
            ("4a", (192, 96, 208, 16, 48, 64)),
            ("4b", (160, 112, 224, 24, 64, 64)),
            ("4c", (128, 128, 256, 24, 64, 64)),
            ("4d", (112, 144, 288, 32, 64, 64)),
            ("4e", (256, 160, 320, 32, 128, 128)),
            ("5a", (256, 160, 320, 32, 128, 128)),
            ("5b", (384, 192, 384, 48, 128, 128)),
        ):
            a, b_in, b, c_in, c, d = (scaled(n, width) for n in channels)
            self.add_module(f"inception{name}", block(features, a, b_in, b, c_in, c, d))
            features = a + b + c + d
        self.fc = nn.Linear(features, num_classes)

    def forward(self, x):
        x = F.max_pool2d(self.conv1(x), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.conv3(self.conv2(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.inception3b(self.inception3a(x)), 3, 2, ceil_mode=True)
        x = self.inception4e(self.inception4d(self.inception4c(self.inception4b(self.inception4a(x)))))
        x = self.inception5b(self.inception5a(F.max_pool2d(x, 2, 2, ceil_mode=True)))
        features = x.mean((2, 3))
        return self.fc(features), features


class BNInception(nn.Module):
    """pretrainedmodels' bninception: flat names, convolutions with bias, every BatchNorm followed by ReLU."""

    BLOCKS = (
        ("3a", 64, 64, 64, 64, 96, 32),
        ("3b", 64, 64, 96, 64, 96, 64),
        ("3c", None, 128, 160, 64, 96, None),
        ("4a", 224, 64, 96, 96, 128, 128),
        ("4b", 192, 96, 128, 96, 128, 128),
        ("4c", 160, 128, 160, 128, 160, 128),
        ("4d", 96, 128, 192, 160, 192, 128),
        ("4e", None, 128, 192, 192, 256, None),
        ("5a", 352, 192, 320, 160, 224, 128),
        ("5b", 352, 192, 320, 192, 224, 128),
    )

    def __init__(self, num_classes, width):
        super().__init__()

        def add(name, features_in, features_out, size, stride=1):
            self.add_module(name, nn.Conv2d(features_in, features_out, size, stride, size // 2))
            self.add_module(f"{name}_bn", nn.BatchNorm2d(features_out))
            return features_out

        n = add("conv1_7x7_s2", 3, scaled(64, width), 7, 2)
        n = add("conv2_3x3_reduce", n, n, 1)
        n = add("conv2_3x3", n, scaled(192, width), 3)
        for block, *channels in self.BLOCKS:
            name, stride = f"inception_{block}_", 1 if channels[0] else 2
            a, b_in, b, c_in, c, d = (scaled(k, width) if k else 0 for k in channels)
            b = add(f"{name}3x3", add(f"{name}3x3_reduce", n, b_in, 1), b, 3, stride)
            c = add(f"{name}double_3x3_1", add(f"{name}double_3x3_reduce", n, c_in, 1), c, 3)
            c = add(f"{name}double_3x3_2", c, c, 3, stride)
            n = b + c + (n if stride == 2 else add(f"{name}1x1", n, a, 1) + add(f"{name}pool_proj", n, d, 1))
        self.last_linear = nn.Linear(n, num_classes)

    def run(self, x, *names):
        for name in names:
            x = torch.relu(getattr(self, f"{name}_bn")(getattr(self, name)(x)))
        return x

    def forward(self, x):
        x = F.max_pool2d(self.run(x, "conv1_7x7_s2"), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.run(x, "conv2_3x3_reduce", "conv2_3x3"), 3, 2, ceil_mode=True)
        for block, *channels in self.BLOCKS:
            name = f"inception_{block}_"
            b = self.run(x, f"{name}3x3_reduce", f"{name}3x3")
            c = self.run(x, f"{name}double_3x3_reduce", f"{name}double_3x3_1", f"{name}double_3x3_2")
            if channels[0] is None:
                x = torch.cat([b, c, F.max_pool2d(x, 3, 2, ceil_mode=True)], 1)
                continue
            if block == "5b":
                pooled = F.max_pool2d(x, 3, 1, 1, ceil_mode=True)
            else:
                pooled = F.avg_pool2d(x, 3, 1, 1, ceil_mode=True, count_include_pad=True)
            x = torch.cat([self.run(x, f"{name}1x1"), b, c, self.run(pooled, f"{name}pool_proj")], 1)
        features = x.mean((2, 3))
        return self.last_linear(features), features


W, H = (1, 7), (7, 1)
SEVEN = ("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, W), ("branch7x7x3_3", 192, H)
DOUBLE = ("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3)
# Branches as units (name, channels, kernel[, stride]). "given": differs between blocks of a kind; "fork": a 1x3 (a) and
# a 3x1 (b) kernel in parallel. Strided units have no padding.
INCEPTION3_KINDS = {
    "A": (
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [*DOUBLE, ("branch3x3dbl_3", 96, 3)],
        [("branch_pool", "given", 1)],
    ),
    "B": ([("branch3x3", 384, 3, 2)], [*DOUBLE, ("branch3x3dbl_3", 96, 3, 2)]),
    "C": (
        [("branch1x1", 192, 1)],
        [("branch7x7_1", "given", 1), ("branch7x7_2", "given", W), ("branch7x7_3", 192, H)],
        [
            ("branch7x7dbl_1", "given", 1),
            ("branch7x7dbl_2", "given", H),
            ("branch7x7dbl_3", "given", W),
            ("branch7x7dbl_4", "given", H),
            ("branch7x7dbl_5", 192, W),
        ],
        [("branch_pool", 192, 1)],
    ),
    "D": ([("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)], [*SEVEN, ("branch7x7x3_4", 192, 3, 2)]),
    "E": (
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), ("branch3x3_2", 384, "fork")],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), ("branch3x3dbl_3", 384, "fork")],
        [("branch_pool", 192, 1)],
    ),
}


def half(size):
    return size // 2 if isinstance(size, int) else tuple(n // 2 for n in size)


class Inception3Block(nn.Module):
    def __init__(self, n, kind, width, given=None):
        super().__init__()
        self.branches, self.features = INCEPTION3_KINDS[kind], 0
        for branch in self.branches:
            features = n
            for name, channels, size, *stride in branch:
                out = scaled(given if channels == "given" else channels, width)
                if size == "fork":
                    self.add_module(f"{name}a", BasicConv2d(features, out, (1, 3), padding=(0, 1)))
                    self.add_module(f"{name}b", BasicConv2d(features, out, (3, 1), padding=(1, 0)))
                    features = 2 * out
                else:
                    self.add_module(name, BasicConv2d(features, out, size, *(stride or (1, half(size)))))
                    features = out
            self.features += features
        self.features += n if kind in "BD" else 0

    def forward(self, x):
        outputs = []
        for branch in self.branches:
            y = F.avg_pool2d(x, 3, 1, 1) if branch[0][0] == "branch_pool" else x
            for name, _, size, *_ in branch:
                parts = (f"{name}a", f"{name}b") if size == "fork" else (name,)
                y = torch.cat([getattr(self, part)(y) for part in parts], 1)
            outputs.append(y)
        if not hasattr(self, "branch_pool"):
            outputs.append(F.max_pool2d(x, 3, 2))
        return torch.cat(outputs, 1)


class Inception3(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        a, b, c, d = (scaled(n, width) for n in (32, 64, 80, 192))
        self.Conv2d_1a_3x3 = BasicConv2d(3, a, 3, 2)
        self.Conv2d_2a_3x3 = BasicConv2d(a, a, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(a, b, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(b, c, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(c, d, 3)
        given = {"5b": 32, "5c": 64, "5d": 64, "6b": 128, "6c": 160, "6d": 160, "6e": 192}
        self.names = []
        for name, kind in zip(
            ["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"], "AAABCCCCDEE", strict=True
        ):
            block = Inception3Block(d, kind, width, given.get(name))
            self.add_module(f"Mixed_{name}", block)
            self.names.append(f"Mixed_{name}")
            d = block.features
        self.fc = nn.Linear(d, num_classes)

    def forward(self, x):
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for name in self.names:
            x = getattr(self, name)(x)
        features = x.mean((2, 3))
        return self.fc(features), features


class Residual(Branches):
    """timm's Block35, Block17 and Block8."""

    def __init__(self, n, inner, scale, relu=True, **branches):
        super().__init__(**branches)
        self.conv2d = nn.Conv2d(inner, n, 1)
        self.scale, self.relu = scale, relu

    def forward(self, x):
        y = self.conv2d(super().forward(x)) * self.scale + x
        return torch.relu(y) if self.relu else y


class InceptionResnetV2(nn.Module):
    def __init__(self, num_classes, width, repeats=(10, 20, 9)):
        super().__init__()
        c, conv = functools.partial(scaled, width=width), BasicConv2d
        self.conv2d_1a = conv(3, c(32), 3, 2)
        self.conv2d_2a = conv(c(32), c(32), 3)
        self.conv2d_2b = conv(c(32), c(64), 3, padding=1)
        self.conv2d_3b = conv(c(64), c(80), 1)
        self.conv2d_4a = conv(c(80), c(192), 3)
        self.mixed_5b = Branches(
            branch0=conv(c(192), c(96), 1),
            branch1=[conv(c(192), c(48), 1), conv(c(48), c(64), 5, padding=2)],
            branch2=[conv(c(192), c(64), 1), conv(c(64), c(96), 3, padding=1), conv(c(96), c(96), 3, padding=1)],
            branch3=[nn.AvgPool2d(3, 1, 1, count_include_pad=False), conv(c(192), c(64), 1)],
        )
        n = c(96) * 2 + c(64) * 2

        def block35():
            two = [conv(n, c(32), 1), conv(c(32), c(32), 3, padding=1)]
            three = [conv(n, c(32), 1), conv(c(32), c(48), 3, padding=1), conv(c(48), c(64), 3, padding=1)]
            return Residual(n, c(32) * 2 + c(64), 0.17, branch0=conv(n, c(32), 1), branch1=two, branch2=three)

        def block17():
            wide, high = {"size": (1, 7), "padding": (0, 3)}, {"size": (7, 1), "padding": (3, 0)}
            seven = [conv(n, c(128), 1), conv(c(128), c(160), **wide), conv(c(160), c(192), **high)]
            return Residual(n, 2 * c(192), 0.10, branch0=conv(n, c(192), 1), branch1=seven)

        def block8(scale, relu):
            wide, high = {"size": (1, 3), "padding": (0, 1)}, {"size": (3, 1), "padding": (1, 0)}
            three = [conv(n, c(192), 1), conv(c(192), c(224), **wide), conv(c(224), c(256), **high)]
            return Residual(n, c(192) + c(256), scale, relu, branch0=conv(n, c(192), 1), branch1=three)

        self.repeat = nn.Sequential(*[block35() for _ in range(repeats[0])])
        self.mixed_6a = Branches(
            branch0=conv(n, c(384), 3, 2),
            branch1=[conv(n, c(256), 1), conv(c(256), c(256), 3, padding=1), conv(c(256), c(384), 3, 2)],
            branch2=nn.MaxPool2d(3, 2),
        )
        n += 2 * c(384)
        self.repeat_1 = nn.Sequential(*[block17() for _ in range(repeats[1])])
        self.mixed_7a = Branches(
            branch0=[conv(n, c(256), 1), conv(c(256), c(384), 3, 2)],
            branch1=[conv(n, c(256), 1), conv(c(256), c(288), 3, 2)],
            branch2=[conv(n, c(256), 1), conv(c(256), c(288), 3, padding=1), conv(c(288), c(320), 3, 2)],
            branch3=nn.MaxPool2d(3, 2),
        )
        n += c(384) + c(288) + c(320)
        self.repeat_2 = nn.Sequential(*[block8(0.20, True) for _ in range(repeats[2])])
        self.block8 = block8(1.0, False)
        self.conv2d_7b = conv(n, c(1536), 1)
        self.classif = nn.Linear(c(1536), num_classes)

    def forward(self, x):
        x = F.max_pool2d(self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x))), 3, 2)
        x = F.max_pool2d(self.conv2d_4a(self.conv2d_3b(x)), 3, 2)
        x = self.repeat_1(self.mixed_6a(self.repeat(self.mixed_5b(x))))
        x = self.conv2d_7b(self.block8(self.repeat_2(self.mixed_7a(x))))
        features = x.mean((2, 3))
        return self.classif(features), features


class InceptionV4C(nn.Module):
    """timm's InceptionC: two of its branches end in a 1x3 (a) and a 3x1 (b) kernel in parallel."""

    def __init__(self, n, c):
        super().__init__()
        wide, high = {"size": (1, 3), "padding": (0, 1)}, {"size": (3, 1), "padding": (1, 0)}
        self.branch0 = BasicConv2d(n, c(256), 1)
        self.branch1_0 = BasicConv2d(n, c(384), 1)
        self.branch1_1a, self.branch1_1b = (BasicConv2d(c(384), c(256), **kernel) for kernel in (wide, high))
        self.branch2_0 = BasicConv2d(n, c(384), 1)
        self.branch2_1 = BasicConv2d(c(384), c(448), **high)
        self.branch2_2 = BasicConv2d(c(448), c(512), **wide)
        self.branch2_3a, self.branch2_3b = (BasicConv2d(c(512), c(256), **kernel) for kernel in (wide, high))
        self.branch3 = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), BasicConv2d(n, c(256), 1))

    def forward(self, x):
        y, z = self.branch1_0(x), self.branch2_2(self.branch2_1(self.branch2_0(x)))
        ends = self.branch1_1a(y), self.branch1_1b(y), self.branch2_3a(z), self.branch2_3b(z)
        return torch.cat([self.branch0(x), *ends, self.branch3(x)], 1)


class InceptionV4(nn.Module):
    def __init__(self, num_classes, width, repeats=(4, 7, 3)):
        super().__init__()
        c = functools.partial(scaled, width=width)

        def path(n, *units):
            """Units (channels, kernel[, "same" or a stride]) in sequence; without the third, there is no padding."""
            layers = []
            for channels, size, *more in units:
                padding = half(size) if more == ["same"] else 0
                layers.append(BasicConv2d(n, c(channels), size, 1 if more in ([], ["same"]) else more[0], padding))
                n = c(channels)
            return layers

        def average(n, channels):
            return [nn.AvgPool2d(3, 1, 1, count_include_pad=False), *path(n, (channels, 1))]

        pool = functools.partial(nn.MaxPool2d, 3, 2)
        n = c(64) + c(96)
        layers = [
            *path(3, (32, 3, 2), (32, 3), (64, 3, "same")),
            Branches(maxpool=pool(), conv=path(c(64), (96, 3, 2))[0]),
            Branches(
                branch0=path(n, (64, 1), (96, 3)),
                branch1=path(n, (64, 1), (64, W, "same"), (64, H, "same"), (96, 3)),
            ),
            Branches(conv=path(2 * c(96), (192, 3, 2))[0], maxpool=pool()),
        ]
        n = 2 * c(96) + c(192)
        for _ in range(repeats[0]):
            two, three = path(n, (64, 1), (96, 3, "same")), path(n, (64, 1), (96, 3, "same"), (96, 3, "same"))
            one = path(n, (96, 1))[0]
            layers.append(Branches(branch0=one, branch1=two, branch2=three, branch3=average(n, 96)))
            n = 4 * c(96)
        two = path(n, (192, 1), (224, 3, "same"), (256, 3, 2))
        layers.append(Branches(branch0=path(n, (384, 3, 2))[0], branch1=two, branch2=pool()))
        n += c(384) + c(256)
        for _ in range(repeats[1]):
            two = path(n, (192, 1), (224, W, "same"), (256, H, "same"))
            three = path(n, (192, 1), (192, H, "same"), (224, W, "same"), (224, H, "same"), (256, W, "same"))
            one = path(n, (384, 1))[0]
            layers.append(Branches(branch0=one, branch1=two, branch2=three, branch3=average(n, 128)))
            n = c(384) + 2 * c(256) + c(128)
        two = path(n, (256, 1), (256, W, "same"), (320, H, "same"), (320, 3, 2))
        layers.append(Branches(branch0=path(n, (192, 1), (192, 3, 2)), branch1=two, branch2=pool()))
        n += c(192) + c(320)
        for _ in range(repeats[2]):
            layers.append(InceptionV4C(n, c))
            n = 6 * c(256)
        self.features = nn.Sequential(*layers)
        self.last_linear = nn.Linear(n, num_classes)

    def forward(self, x):
        features = self.features(x).mean((2, 3))
        return self.last_linear(features), features
