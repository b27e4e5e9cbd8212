"""Small ResNet-50s built with TensorFlow as S4L and revisiting-self-supervised build them. Needs TensorFlow."""

import contextlib
import pathlib

import numpy as np
import tensorflow as tf

tf1 = tf.compat.v1
EPSILON = 1e-3


class Layers:
    """Makes layers and names them as tf.layers does: within each scope, numbered by their kind."""

    def __init__(self):
        self.scopes, self.counts, self.rng = [], {}, np.random.default_rng(0)

    @contextlib.contextmanager
    def scope(self, name):
        self.scopes.append(name)
        yield
        self.scopes.pop()

    def _name(self, kind):
        prefix = "".join(f"{scope}/" for scope in self.scopes)
        number = self.counts[prefix + kind] = self.counts.get(prefix + kind, -1) + 1
        return f"{prefix}{kind}_{number}" if number else prefix + kind

    def _variable(self, name, values):
        return tf1.get_variable(name, initializer=tf.constant(np.float32(values)), use_resource=False)

    def conv(self, x, features, size=1, stride=1, name=None):
        name, shape = name or self._name("conv2d"), (size, size, x.shape[-1], features)
        kernel = self._variable(f"{name}/kernel", self.rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:3])))
        if size > 1:  # explicit, symmetric padding
            x = tf.pad(x, [[0, 0], [size // 2] * 2, [size // 2] * 2, [0, 0]])
        y = tf.nn.conv2d(x, kernel, stride, "VALID", name=f"{name}/Conv2D")
        return y

    def head(self, x, features, name):
        y = self.conv(x, features, name=name)
        return y + self._variable(f"{name}/bias", self.rng.normal(size=features))

    def norm_relu(self, x, relu=True):
        name, d = self._name("batch_normalization"), x.shape[-1]
        variance = self.rng.uniform(0.002, 0.02, d)  # small, so that epsilon matters
        arrays = {
            "gamma": self.rng.uniform(0.3, 1.0, d) * np.sqrt(variance),
            "beta": 0.2 * self.rng.normal(size=d),
            "moving_mean": 0.2 * self.rng.normal(size=d),
            "moving_variance": variance,
        }
        gamma, beta, mean, var = (self._variable(f"{name}/{part}", values) for part, values in arrays.items())
        y = tf1.nn.fused_batch_norm(
            x, gamma, beta, mean, var, EPSILON, is_training=False, name=f"{name}/FusedBatchNorm"
        )
        return tf.nn.relu(y[0]) if relu else y[0]


def _unit_v2(layers, x, features, stride, scoped):
    scope = layers.scope if scoped else lambda name: contextlib.nullcontext()
    shortcut, y = x, layers.norm_relu(x)
    if x.shape[-1] != features or stride > 1:
        with scope("proj"):
            shortcut = layers.conv(y, features, 1, stride)
    with scope("a"):
        y = layers.conv(y, features // 4)
    with scope("b"):
        y = layers.conv(layers.norm_relu(y), features // 4, 3, stride)
    with scope("c"):
        y = layers.conv(layers.norm_relu(y), features)
    return y + shortcut


def _unit_v1(layers, x, features, stride, scoped):
    shortcut = x
    if x.shape[-1] != features or stride > 1:
        shortcut = layers.norm_relu(layers.conv(x, features, 1, stride), relu=False)
    y = layers.norm_relu(layers.conv(x, features // 4))
    y = layers.norm_relu(layers.conv(y, features // 4, 3, stride))
    y = layers.norm_relu(layers.conv(y, features), relu=False)
    return tf.nn.relu(y + shortcut)


def resnet50(images, layout, width=8, root_stride=2, last_stride=2):
    """Builds the net in the current graph; returns features [b, d]. `layout`: s4l, revisiting_v1 or revisiting_v2."""
    layers, scoped, unit = Layers(), layout == "s4l", _unit_v1 if layout == "revisiting_v1" else _unit_v2
    scope = layers.scope if scoped else lambda name: contextlib.nullcontext()
    with scope("root_block"):
        x = layers.conv(images, width, 7, root_stride)
        x = layers.norm_relu(x) if layout == "revisiting_v1" else x
        x = tf.nn.max_pool2d(tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]]), 3, 2, "VALID")
    for stage, num_units in enumerate((3, 4, 6, 3)):
        with scope(f"block{stage + 1}"):
            for i in range(num_units):
                with scope(f"unit{i + 1}"):
                    stride = (1, 2, 2, last_stride)[stage] if i == 0 else 1
                    x = unit(layers, x, 4 * width * 2**stage, stride, scoped)
    x = x if layout == "revisiting_v1" else layers.norm_relu(x)
    features = tf.reduce_mean(x, [1, 2], keepdims=True)
    if scoped:
        layers.head(features, 5, "classes")
        layers.head(features, 4, "rotations")
    else:
        layers.head(features, 4, "conv2d_53")
    return features[:, 0, 0]


def save(folder: pathlib.Path, layout: str, images: np.ndarray, module: bool, change=lambda x: x, **options):
    """Writes a checkpoint and returns (its path, features of the images, name -> array).

    Args:
      folder: where to write.
      images: [b, h, w, 3].
      module: write a saved model rather than a checkpoint with the state of an optimizer.
      change: what the graph does with the images first.
      options: of `resnet50`.
    """
    with tf1.Graph().as_default(), tf1.Session() as session:
        given = tf1.placeholder(tf.float32, (None, *images.shape[1:]), name="images")
        features = resnet50(change(given), layout, **options)
        weights = tf1.global_variables()
        if not module:
            tf1.get_variable("global_step", initializer=np.int64(7), use_resource=False)
            first = weights[0].op.name
            tf1.get_variable(f"{first}/Momentum", initializer=tf.zeros(weights[0].shape), use_resource=False)
        session.run(tf1.global_variables_initializer())
        found = session.run(features, {given: images})
        arrays = dict(zip((x.op.name for x in weights), session.run(weights), strict=True))
        if module:
            path = folder / "module"
            tf1.saved_model.simple_save(session, str(path), {"images": given}, {"features": features})
        else:
            path = folder / "model.ckpt-7"
            tf1.train.Saver().save(session, str(path))
    return path, found, arrays
