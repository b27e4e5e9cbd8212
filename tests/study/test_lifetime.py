"""A finished study leaves nothing in memory: no cache outlives it with its data sets."""

import ast
import gc
import weakref

import jax
import pytest

from helpers.source_files import FILES, PACKAGE
from helpers.studies import TARGET, one_epoch_config
from jax_transfer.checkpoints.trajectory import Trajectory
from jax_transfer.study import checks
from jax_transfer.study.stages import STAGES
from jax_transfer.study.workspace import Workspace
from jax_transfer.training import optimizers, state

CACHES = {"cache", "lru_cache", "cached_property"}
PLAIN = {"str", "int", "float", "bool", "None", "pathlib.Path"}


def save_initialisation(work, epochs):
    """What the stage pretrain leaves, without a training."""
    (pretraining,) = work.pretrainings
    objective = work.objective(pretraining)
    initial = state.init_state(objective, optimizers.make_optimizer(optimizers.OptimizerSettings(), 1), 0)
    trajectory = Trajectory(work.folder(pretraining) / "checkpoints")
    for epoch in epochs:
        trajectory.save(epoch, *state.divide(objective, initial), {})
    trajectory.close()


def remembered(work):
    """Weak references to a study and to its data sets, as they are on the host and on the device."""
    found = {"workspace": work}
    for dataset in (*work.sources, *work.config.targets):
        for split in ("train", "test"):
            source, feed = work.source(dataset, split), work.feed(dataset, split)
            parts = {"source": source, "labels": source.labels, "feed": feed, "pixels": feed.held.images}
            found |= {f"{part} of {dataset} {split}": x for part, x in parts.items()}
    return {name: weakref.ref(x) for name, x in found.items()}


def run_study(workdir, closed):
    config = one_epoch_config(scores=("logme", "leep"), stages=("features", "probe", "scores", "report"))
    config.probe.epochs = 1
    work = Workspace(config, workdir)
    save_initialisation(work, [snapshot.epoch for snapshot in work.snapshots])
    checks.check_data(work)
    for name in config.stages:
        STAGES[name].run(work)
    found = remembered(work)
    if closed:
        work.close()
        assert not work.caches
    return found


@pytest.mark.parametrize("closed", (True, False))
def test_nothing_of_a_finished_study_stays_in_memory(tmp_path, closed):
    found = run_study(tmp_path, closed)
    assert len(found) == 17
    gc.collect()
    assert [name for name, reference in found.items() if reference() is not None] == []


def _decorated_for_ever(tree):
    """The functions whose cache lives as long as the process: at the top of a file, or methods of a class."""
    for scope in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        for node in scope.body:
            if isinstance(node, ast.FunctionDef):
                names = {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}
                if names & (CACHES - {"cached_property"}):
                    yield node


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_is_cached_for_ever_is_called_with_plain_values(path):
    """Nets are made from names and numbers; whatever holds data is cached by what dies with it."""
    for node in _decorated_for_ever(ast.parse(path.read_text())):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        assert not {"self", "work", "source", "feed", "features", "snapshot", "pretraining"} & {
            a.arg for a in arguments
        }
        annotations = {ast.unparse(a.annotation) for a in arguments if a.annotation}
        assert annotations <= PLAIN, f"{path.name}: {node.name} is cached for ever by {annotations - PLAIN}"


def test_target_of_small_studies_is_resident(tmp_path):
    """Else the tests above would watch nothing on a device."""
    work = Workspace(one_epoch_config(), tmp_path)
    assert isinstance(work.feed(TARGET, "train").held.images, jax.Array)
