"""MoCo v2, SimCLR and DINO: their formulas, what BatchNorm gives away, several devices, and errors."""

import itertools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helpers.objectives import SMALL
from helpers.source_files import REPOSITORY, get_config
from helpers.training_parts import structured_source, tiny_net
from jax_transfer import devices, trees
from jax_transfer.data.batches import joined, make_feed
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.layers import BatchNorm, in_groups
from jax_transfer.models.net import Output, make_net
from jax_transfer.records import InputError, Views
from jax_transfer.study import checks
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.objectives.simclr import nt_xent
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import init_state
from jax_transfer.training.steps import make_train_step, many_steps

BATCH, QUEUE = 8, 24
NAMES = ("moco_v2", "simclr", "dino")
TEMPERATURES = {"moco_v2": 0.3, "simclr": 0.4}


def some_views(number, seed=0, b=BATCH):
    rng = np.random.default_rng(seed)
    images = tuple(rng.normal(size=(b, 8, 8, 3)).astype(np.float32) for _ in range(number))
    return {"train": Views(images, np.zeros(b, np.int32), np.ones(b, bool))}


@pytest.fixture(scope="module")
def computed():
    """Name -> an objective on a net without BatchNorm, and its compiled loss and gradient."""
    net, found = tiny_net(num_classes=0), {}
    for name in NAMES:
        settings = {**SMALL[name], **({"temperature": TEMPERATURES[name]} if name in TEMPERATURES else {})}
        settings |= {"queue_size": QUEUE} if name == "moco_v2" else {}
        objective = OBJECTIVES[name](net, (), **settings)
        found[name] = objective, jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    return found


def in_torch(torch, tree):
    return {name: torch.tensor(np.array(leaf), requires_grad=True) for name, leaf in trees.flatten(tree).items()}


def features_in_torch(torch, net_params, images):
    """Returns the features of each view, and a function that pulls a gradient of them back to the net's parameters."""
    params = {"conv": net_params["conv"]}
    net = tiny_net(num_classes=0)
    features, back = jax.vjp(lambda p: net.apply(p, {}, jnp.concatenate(images)).features, params)
    tensor = torch.tensor(np.array(features), requires_grad=True)
    return tensor, lambda: trees.flatten(back(jnp.asarray(tensor.grad.numpy()))[0])


def assert_gradients(found, tensors, back):
    """Compares the gradients by the parameters of a head, `tensors`, and by those of the net with torch's."""
    found = trees.flatten(found)
    expected = {name: tensor.grad.numpy() for name, tensor in tensors.items()}
    for name, gradient in expected.items():
        np.testing.assert_allclose(found.pop(name), gradient, rtol=1e-4, atol=2e-6)
    for name, gradient in back().items():
        (own,) = [key for key in found if key.endswith(name)]
        np.testing.assert_allclose(found.pop(own), gradient, rtol=1e-4, atol=2e-6)
    assert not found


def mlp(torch, weights, x, prefix, activation):
    names = sorted({name.split("/")[-2] for name in weights if name.startswith(prefix) and "last" not in name})
    for i, layer in enumerate(names):
        x = (activation(x) if i else x) @ weights[f"{prefix}{layer}/kernel"] + weights[f"{prefix}{layer}/bias"]
    return x


def moved(old, new, momentum=0.9):
    return jax.tree.map(lambda a, b: momentum * np.asarray(a) + (1 - momentum) * np.asarray(b), old, new)


# --- the formulas


def test_nt_xent_equals_loops():
    x, y = np.random.default_rng(0).normal(size=(2, 5, 3))
    z = [v / np.linalg.norm(v) for v in (*x, *y)]
    losses = []
    for i in range(10):
        similar = np.exp([z[i] @ z[j] / 0.3 for j in range(10)])
        losses.append(-np.log(similar[(i + 5) % 10] / (similar.sum() - similar[i])))
    np.testing.assert_allclose(nt_xent(x, y, 0.3), np.reshape(losses, (2, 5)), rtol=1e-5)


def test_simclr_equals_torch(computed):
    torch = pytest.importorskip("torch")
    objective, gradient_of = computed["simclr"]
    params, aux = objective.init(jax.random.key(0), None)
    views = some_views(2)
    (value, (_, metrics)), gradient = gradient_of(params, aux, views, jax.random.key(1))
    weights = in_torch(torch, {"projection": params["projection"]})
    features, back = features_in_torch(torch, params, views["train"].images)
    z = torch.nn.functional.normalize(mlp(torch, weights, features, "projection/", torch.relu), dim=1)
    logits = (z @ z.T / TEMPERATURES["simclr"]).masked_fill(torch.eye(2 * BATCH, dtype=bool), -torch.inf)
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(2 * BATCH).roll(BATCH))
    loss.backward()
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    assert_gradients(gradient, weights, back)
    between = z[:BATCH] @ z[BATCH:].T
    assert float(metrics["contrast"]) == (between.argmax(1) == torch.arange(BATCH)).float().mean()


def test_moco_equals_torch(computed):
    torch = pytest.importorskip("torch")
    objective, gradient_of = computed["moco_v2"]
    params, aux = objective.init(jax.random.key(0), None)
    slow, _ = objective.init(jax.random.key(1), None)
    aux, views = {**aux, "key_params": slow, "next": jnp.int32(BATCH)}, some_views(2)
    (value, (new, metrics)), gradient = gradient_of(params, aux, views, jax.random.key(2))
    weights, slower = in_torch(torch, {"projection": params["projection"]}), moved(slow, params)
    first, second = views["train"].images
    features, back = features_in_torch(torch, params, [first])
    key_features, _ = features_in_torch(torch, slower, [second])
    q = torch.nn.functional.normalize(mlp(torch, weights, features, "projection/", torch.relu), dim=1)
    k = mlp(torch, in_torch(torch, {"projection": slower["projection"]}), key_features, "projection/", torch.relu)
    k = torch.nn.functional.normalize(k, dim=1).detach()
    negatives = q @ torch.tensor(np.array(aux["queue"])).T
    logits = torch.cat([(q * k).sum(1, keepdim=True), negatives], 1) / TEMPERATURES["moco_v2"]
    loss = torch.nn.functional.cross_entropy(logits, torch.zeros(BATCH, dtype=int))
    loss.backward()
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    assert_gradients(gradient, weights, back)
    assert float(metrics["contrast"]) == (logits.argmax(1) == 0).float().mean()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), new["key_params"], slower)
    expected = np.concatenate([aux["queue"][:BATCH], k.numpy(), aux["queue"][2 * BATCH :]])
    np.testing.assert_allclose(new["queue"], expected, atol=1e-6)
    assert int(new["next"]) == 2 * BATCH


def test_new_keys_replace_the_oldest(computed):
    objective, gradient_of = computed["moco_v2"]
    params, aux = objective.init(jax.random.key(0), None)
    queues, places = [np.asarray(aux["queue"])], [0]
    for step in range(4):
        (_, (aux, _)), _ = gradient_of(params, aux, some_views(2, seed=step), jax.random.key(step))
        queues.append(np.asarray(aux["queue"]))
        places.append(int(aux["next"]))
    assert places == [0, 8, 16, 0, 8]
    for step, (old, new) in enumerate(itertools.pairwise(queues)):
        changed = (old != new).any(1)
        np.testing.assert_array_equal(np.flatnonzero(changed), np.arange(BATCH) + places[step])
    np.testing.assert_allclose(np.linalg.norm(queues[-1], axis=1), 1, rtol=1e-5)


def test_dino_equals_torch(computed):
    torch = pytest.importorskip("torch")
    objective, gradient_of = computed["dino"]
    params, aux = objective.init(jax.random.key(0), None)
    slow, _ = objective.init(jax.random.key(1), None)
    center = 0.1 * np.random.default_rng(0).normal(size=aux["center"].shape).astype(np.float32)
    aux, views = {**aux, "teacher": slow, "center": center}, some_views(3)
    (value, (new, _)), gradient = gradient_of(params, aux, views, jax.random.key(2))

    def outputs(params, images):
        weights = in_torch(torch, {"head": params["head"]})
        features, back = features_in_torch(torch, params["net"], images)
        x = mlp(torch, weights, features, "head/", torch.nn.functional.gelu)
        last = weights["head/last/kernel"]
        return torch.nn.functional.normalize(x, dim=1) @ (last / last.norm(dim=0)), weights, back

    student, weights, back = outputs(params, views["train"].images)
    teacher = outputs(moved(slow, params), views["train"].images[:2])[0].detach()
    predicted = torch.log_softmax(student / 0.1, 1).split(BATCH)
    targets = torch.softmax((teacher - torch.tensor(center)) / 0.04, 1).split(BATCH)
    terms = [-(t * p).sum(1).mean() for i, t in enumerate(targets) for j, p in enumerate(predicted) if i != j]
    loss = sum(terms) / len(terms)
    loss.backward()
    assert len(terms) == 4 and float(value) == pytest.approx(loss.item(), rel=1e-5)
    assert_gradients(gradient, weights, back)
    np.testing.assert_allclose(new["center"], 0.9 * center + 0.1 * teacher.mean(0).numpy(), atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), new["teacher"], moved(slow, params)
    )


def test_dino_keeps_the_teacher():
    net = tiny_net(num_classes=0, batch_norm=True)
    objective = OBJECTIVES["dino"](net, (), **SMALL["dino"])
    params, aux = objective.init(jax.random.key(0), None)
    aux |= {
        "teacher": jax.tree.map(lambda x: x + 1, params),
        "teacher_stats": jax.tree.map(lambda x: x + 1, aux["stats"]),
    }
    model = objective.model(params, aux)
    assert model["params"] is aux["teacher"]["net"] and model["stats"] is aux["teacher_stats"]
    assert len(objective.views["train"]) == 2 + SMALL["dino"]["num_local"]


# --- what BatchNorm gives away


class Corner(nnx.Module):
    """BatchNorm, of which only a corner pixel is seen."""

    def __init__(self, rngs):
        self.bn = BatchNorm(3)

    def __call__(self, images, train, rngs):
        features = self.bn(images, train)[:, 0, 0]
        return Output(features[:, :0], features)


@pytest.mark.parametrize(
    ("group", "shuffled", "recognised"),
    [(16, False, True), (16, True, False), (256, True, True)],
    ids=["groups in order", "groups in random order", "one group"],
)
def test_batch_norm_gives_keys_away_unless_its_groups_are_smaller_and_shuffled(
    group, shuffled, recognised, monkeypatch
):
    """The corner has the same colour in all images, so that its features show nothing but the statistics of a group.

    The queue holds the keys of the 64 groups of four other batches, so that chance is 1 / 65. A single group cannot be
    shuffled; `Objective.check` refuses it.
    """
    if not shuffled:
        monkeypatch.setattr(jax.random, "permutation", lambda key, n: jnp.arange(n))
    make = in_groups(Corner, group)
    net = make_net("corner", make, num_classes=0, feature_dim=3, min_image_size=1, classifier=("fc",))
    objective = OBJECTIVES["moco_v2"](net, (), queue_size=1024, hidden_dim=64, projection_dim=32)
    params, aux = objective.init(jax.random.key(0), None)
    rng, contrast = np.random.default_rng(0), 0.0
    loss = jax.jit(objective.loss)
    for step in range(5):
        images = np.zeros((256, 4, 4, 3), np.float32)
        images[:, :, 2:] = rng.normal(size=(256, 1, 1, 3))
        views = {"train": Views((images, images), np.zeros(256, np.int32), np.ones(256, bool))}
        _, (aux, metrics) = loss(params, aux, views, jax.random.key(step))
        contrast = float(metrics["contrast"])
    assert contrast > 0.95 if recognised else contrast < 0.1


# --- several devices

PREPROCESSING = Preprocessing(image_size=24)


def three_steps(name):
    """Returns the parameters and the other state after three steps on all devices."""
    net = tiny_net(num_classes=0, batch_norm=True, group=4)
    objective = OBJECTIVES[name](net, ("color_jitter",), **SMALL[name])
    feed = make_feed(structured_source(48), PREPROCESSING, devices.make_mesh())
    feeds = joined({"train": (feed, 16)})
    optimizer = make_optimizer(OptimizerSettings(learning_rate=0.05), 100)
    run = many_steps(make_train_step(objective, optimizer, PREPROCESSING, feeds.num_classes), feeds.fetch, feed.mesh)
    state = devices.replicate(init_state(objective, optimizer, 0), feed.mesh)
    for items in feeds.items(range(3), 1, 0):
        state, _ = run(state, feeds.held, items, 1)
    return trees.flatten({"params": state["params"], "aux": state["aux"]})


def program(name):
    """Returns the compiled loss and gradient of 32 images that are split over all devices, as text."""
    objective = OBJECTIVES[name](tiny_net(num_classes=0, batch_norm=True, group=8), (), **SMALL[name])
    mesh = devices.make_mesh()
    views = devices.split(some_views(len(objective.views["train"]), b=32), mesh, "data")
    state = devices.replicate(objective.init(jax.random.key(0), None), mesh)
    compute = devices.on_mesh(jax.value_and_grad(objective.loss, has_aux=True), mesh)
    compute = jax.jit(compute, out_shardings=devices.replicated(mesh))
    return compute.lower(*state, views, jax.random.key(1)).compile().as_text()


# A child process, since the number of simulated devices is fixed at the start of a process.
ON_FOUR_DEVICES = """
import sys; sys.path[:0] = ["tests", "tests/training"]
import pathlib, numpy as np, jax, test_contrastive as own
assert jax.device_count() == 4
for name in own.NAMES:
    state = own.three_steps(name)
    np.savez(f"{sys.argv[1]}/{name}.npz", **{key.replace("/", "|"): value for key, value in state.items()})
    pathlib.Path(sys.argv[1], f"{name}.txt").write_text(own.program(name))
"""


@pytest.fixture(scope="module")
def on_four_devices(tmp_path_factory):
    """Folder of the states after three steps on four devices, and of the compiled losses."""
    folder = tmp_path_factory.mktemp("four")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", ON_FOUR_DEVICES, str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_one_and_four_devices_give_the_same_state(name, on_four_devices):
    alone = three_steps(name)
    together = np.load(on_four_devices / f"{name}.npz")
    assert len(alone) == len(together.files)
    for key, value in alone.items():
        np.testing.assert_allclose(together[key.replace("/", "|")], value, rtol=1e-4, atol=1e-5, err_msg=key)


def shapes(pattern, text):
    """Returns the shapes of the results of the operations that match a pattern."""
    found = re.findall(rf"= \w+\[([\d,]*)\]\S* (?:{pattern})\(", text)
    return [tuple(int(n) for n in shape.split(",") if n) for shape in found]


@pytest.mark.parametrize("name", NAMES)
def test_each_of_four_devices_computes_its_own_images(name, on_four_devices):
    """A device has 8 of 32 images: each convolution sees their views; only moco_v2 exchanges images, for its keys."""
    text = pathlib.Path(on_four_devices / f"{name}.txt").read_text()
    activations = [shape for shape in shapes("convolution", text) if shape[1:3] == (8, 8)]
    most = {"moco_v2": 8, "simclr": 8 * 2, "dino": 8 * 3}[name]
    assert activations and max(shape[0] for shape in activations) == most
    exchanged = shapes("all-gather|all-to-all|collective-permute", text)
    embeddings = [shape for shape in exchanged if len(shape) == 2]
    assert all(shape in ((32, 12), (12, 32)) for shape in embeddings)
    assert name == "moco_v2" or len(embeddings) == len(exchanged)
    if name == "simclr":  # rows of the logits stay with their images
        assert embeddings and (8, 32) in shapes("dot", text) and (32, 32) not in shapes("dot", text)


# --- errors


def configure(objective, changes):
    config = get_config("quickstart", "smoke")
    config.source.dataset = "embedded:digits?train=160&test=64"
    config.pretrain.batch_size = 32
    config.pretrain.objective = objective
    config.pretrain.moco_v2.queue_size = 64
    config.model.batch_norm_group = 8
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        (
            "moco_v2",
            {"pretrain.moco_v2.queue_size": 100},
            r"moco_v2\.queue_size = 100 is not a multiple of batch_size = 32: use 96, or another batch_size\.$",
        ),
        (
            "moco_v2",
            {"model.batch_norm_group": None},
            r"all 32 images of a batch together.* set config\.model\.batch_norm_group .* such as 4\.$",
        ),
        ("moco_v2", {"model.batch_norm_group": 32}, r"all 32 images of a batch together"),
        *((name, {"pretrain.microbatches": 2}, r"microbatches = 2: .*leave it at 1, and") for name in NAMES),
        ("moco_v2", {"pretrain.batch_size": 1, "model.batch_norm_group": None}, r"batch_size = 1: .* use 2 or more"),
        ("simclr", {"pretrain.batch_size": 1, "model.batch_norm_group": None}, r"batch_size = 1: .* use 2 or more"),
        ("dino", {}, r"groups of 8 images \(batch_norm_group\), .* leave it unset, so that the whole batch"),
        ("simclr", {}, r"groups of 8 images \(batch_norm_group\), .* leave it unset, so that the whole batch"),
    ],
)
def test_batches_are_checked(objective, changes, message, tmp_path):
    config = configure(objective, changes)
    with pytest.raises(InputError, match=rf"^config\.pretrain with the objective {objective}: .*{message}") as error:
        checks.check_data(Workspace(config, tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("moco_v2", {}),
        ("dino", {"model.batch_norm_group": None}),
        ("simclr", {"model.batch_norm_group": None}),
        (
            "moco_v2",
            {
                "model.name": "vit_tiny_patch4_32",
                "model.stem": None,
                "model.width": None,
                "model.batch_norm_group": None,
            },
        ),
    ],
)
def test_valid_batches_are_accepted(objective, changes, tmp_path):
    checks.check_data(Workspace(configure(objective, changes), tmp_path))


def test_crops_that_an_objective_names_itself_are_checked(tmp_path):
    config = configure(
        "dino",
        {"model.batch_norm_group": None, "preprocessing.interpolation": "nearest", "pretrain.augment": ("flip",)},
    )
    with pytest.raises(
        InputError, match=r"interpolation of random crops \(config\.preprocessing\.interpolation\): 'nea"
    ):
        checks.check_data(Workspace(config, tmp_path))


def test_a_queue_that_the_batch_does_not_divide_is_refused_by_the_loss_too(computed):
    objective, _ = computed["moco_v2"]
    params, aux = objective.init(jax.random.key(0), None)
    with pytest.raises(InputError, match="queue_size = 24 is not a multiple of batch_size = 5: use 25,"):
        objective.loss(params, aux, some_views(2, b=5), jax.random.key(0))


@pytest.mark.parametrize("name", (*NAMES, "clip"))
def test_mixed_images_are_refused(name):
    with pytest.raises(InputError, match=f"objective {name} compares single images, .* by 'mixup': leave it out"):
        OBJECTIVES[name](tiny_net(num_classes=0), ("flip", "mixup"), **SMALL[name])
