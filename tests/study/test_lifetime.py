"""A finished study leaves nothing in memory: no cache keeps its data sets alive."""

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
# A Net holds functions and shapes, but no arrays.
PLAIN_TYPES = {
    "str",
    "int",
    "int | None",
    "float",
    "bool",
    "None",
    "pathlib.Path",
    "tuple[int, ...]",
    "tuple[int, int]",
    "Net",
}


def save_initialisation(work, epochs):
    """Saves the initialisation as each of these epochs, as if the stage pretrain had run."""
    (pretraining,) = work.pretrainings
    objective = work.objective(pretraining)
    initial = state.init_state(objective, optimizers.make_optimizer(optimizers.OptimizerSettings(), 1), 0)
    trajectory = Trajectory(work.folder(pretraining) / "checkpoints")
    for epoch in epochs:
        trajectory.save(epoch, *state.divide(objective, initial), {})
    trajectory.close()


def weak_references(work):
    """Returns weak references to a study and to its data sets, on the host and on the device."""
    objects = {"workspace": work}
    for dataset in (*work.sources, *work.config.targets):
        for split in ("train", "test"):
            source, feed = work.source(dataset, split), work.feed(dataset, split, work.preprocessing)
            parts = {"source": source, "labels": source.labels, "feed": feed, "pixels": feed.held.images}
            objects |= {f"{name} of {dataset} {split}": part for name, part in parts.items()}
    return {name: weakref.ref(x) for name, x in objects.items()}


def run_study(workdir, closed):
    config = one_epoch_config(scores=("logme", "leep"), stages=("features", "probe", "scores", "report"))
    config.probe.epochs = 1
    work = Workspace(config, workdir)
    save_initialisation(work, [work.epoch(snapshot) for snapshot in work.snapshots])
    checks.check_data(work)
    for name in config.stages:
        STAGES[name].run(work)
    references = weak_references(work)
    if closed:
        work.close()
        assert not work.caches
    return references


@pytest.mark.parametrize("closed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_finished_study_leaves_nothing_in_memory(tmp_path, closed):
    references = run_study(tmp_path, closed)
    assert len(references) == 17
    gc.collect()
    assert [name for name, reference in references.items() if reference() is not None] == []


def _permanently_cached(tree):
    """Yields functions and methods whose cache lives as long as the process."""
    for scope in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        for node in scope.body:
            if isinstance(node, ast.FunctionDef):
                names = {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}
                if names & (CACHES - {"cached_property"}):
                    yield node


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_permanent_caches_take_only_plain_values(path):
    """A permanent cache with data among its arguments would keep that data in memory."""
    for node in _permanently_cached(ast.parse(path.read_text())):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        assert not {"self", "work", "source", "feed", "features", "snapshot", "pretraining"} & {
            a.arg for a in arguments
        }
        annotations = {ast.unparse(a.annotation) for a in arguments if a.annotation}
        assert annotations <= PLAIN_TYPES, f"{path.name}: {node.name} keeps {annotations - PLAIN_TYPES} alive"


def test_target_of_small_studies_is_resident(tmp_path):
    """Otherwise the tests above would follow no array on a device."""
    work = Workspace(one_epoch_config(), tmp_path)
    assert isinstance(work.feed(TARGET, "train", work.preprocessing).held.images, jax.Array)
