"""The scores stage ranks checkpoints of several sources; one that cannot be scored does not stop the others."""

import itertools
import math
import re
import shutil
import types

import jax
import numpy as np
import pytest

from helpers.reports import Elements
from helpers.studies import TARGET, one_epoch_config, run_stages
from jax_transfer import devices, trees
from jax_transfer.analysis import SCORES, score_all, why_undefined
from jax_transfer.data.subsets import stratified_split
from jax_transfer.features import cache, extract
from jax_transfer.models import MODELS
from jax_transfer.records import Features, InputError
from jax_transfer.report import trust
from jax_transfer.report.tables import EN_DASH
from jax_transfer.results import Rows
from jax_transfer.study import checks, settings
from jax_transfer.study import finetune as finetune_stage
from jax_transfer.study import scores as score_stage
from jax_transfer.study.finetune import Run
from jax_transfer.study.workspace import Workspace
from jax_transfer.transfer.finetune import FINETUNE_SCORES, Finetuned
from jax_transfer.trust.evidence import NAIVE
from jax_transfer.trust.naive import naive_values, static_values


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two")
    config = one_epoch_config(scores=("logme", "leep", "nleep", "finetune_1"))
    config.source.others = ("embedded:mnist_5k?train=256&test=64",)
    return config, workdir, run_stages(config, workdir)


def test_checkpoints_of_several_sources_are_ranked_together(two_sources):
    config, workdir, results = two_sources
    names = {"digits/0", "digits/1", "mnist_5k/0", "mnist_5k/1"}
    assert {(row["checkpoint"], row["source"]) for row in results["pretrain"]} == {
        (name, config.source.dataset if "digits" in name else config.source.others[0]) for name in names
    }
    for score in config.scores:
        assert {row["checkpoint"] for row in results["scores"] if row["score"] == score} == names
    assert {row["checkpoint"] for row in results["spectral"]} == names
    assert {row["num_checkpoints"] for row in results["ranking"]} == {4}
    assert (workdir / "checkpoints/1").is_dir() and (workdir / "others/mnist_5k/checkpoints/1").is_dir()
    page = (workdir / "report/index.html").read_text()
    assert "from mnist_5k" in page and "4 checkpoints are too few" in page
    assert all(row["forward_gflops"] > 0 and not row["error"] for row in results["scores"])
    assert all((row["gflops"] > 0) == (row["score"] in config.scores) for row in results["scores"])


@pytest.mark.slow  # .ci/run ranks those of twelve models
def test_checkpoints_of_several_models_are_ranked_together(tmp_path):
    config = one_epoch_config(scores=("logme", "leep", "finetune_1"))
    config.model.others = ({"name": "resnet10", "stem": "cifar", "width": 4},)
    results = run_stages(config, tmp_path)
    names = {f"resnet10_cifar_{width}/{epoch}" for width in (4, 8) for epoch in (0, 1)}
    for file in ("pretrain", "transfer", "spectral", "similarity"):
        assert {row["checkpoint"] for row in results[file]} == names
    for score in config.scores:
        assert {row["checkpoint"] for row in results["scores"] if row["score"] == score} == names
    assert len(results["similarity"]) == 2 * len(names) ** 2  # before fine-tuning and after it
    assert {row["baseline"] for row in results["trust"]} == {"num_parameters"}
    assert {row["num_checkpoints"] for row in results["ranking"]} == {4}
    rows = [row for file in ("scores", "transfer", "spectral") for row in results[file]]
    assert not any(row["error"] for row in rows)
    # The wider net costs more, so each net has its own count.
    work = {row["checkpoint"]: row["forward_gflops"] for row in results["scores"]}
    assert work["resnet10_cifar_8/0"] > 2 * work["resnet10_cifar_4/0"]
    dims = {np.load(path)["features"].shape[1] for path in (tmp_path / "features").iterdir()}
    assert dims == {32, 64}


def values_of(results, score):
    return {row["checkpoint"]: row["value"] for row in results["scores"] if row["score"] == score}


def test_naive_lists_stand_beside_the_scores(two_sources):
    *_, results = two_sources
    names = ("digits/0", "digits/1", "mnist_5k/0", "mnist_5k/1")
    for equal in ("num_parameters", "forward_gflops"):
        assert values_of(results, equal).keys() == set(names) and len(set(values_of(results, equal).values())) == 1
    assert values_of(results, "last_epoch") == dict(zip(names, (0, 1, 0, 1), strict=True))
    pretrained = {row["checkpoint"]: row["test_accuracy"] for row in results["pretrain"]}
    assert values_of(results, "source_accuracy") == pretrained and values_of(results, "static") == {}
    naive = [row for row in results["scores"] if row["score"] in NAIVE]
    assert all(row["gflops"] == 0 and row["seconds"] == 0 and row["forward_gflops"] > 0 for row in naive)


def test_scores_of_one_architecture_are_compared_with_the_last_epoch(two_sources):
    config, workdir, results = two_sources
    methods = {row["method"] for row in results["transfer"]}
    judged = {(row["method"], row["score"]): row for row in results["trust"]}
    for method in methods:
        assert {row["baseline"] for row in results["trust"] if row["method"] == method} == {"last_epoch"}
        for score in config.scores:
            row = judged[method, score]
            assert row["difference"] == pytest.approx(row["kendall"] - judged[method, "last_epoch"]["kendall"])
        assert judged[method, "num_parameters"]["kendall"] is None  # constant
        cells = {r["Score"]: r for r in trust.trust_rows(results["ranking"], [], method, results["trust"])}
        assert {cells["Parameters"][title] for title in ("Kendall", trust.AGAINST)} == {EN_DASH}
        assert (judged[method, "logme"]["num_epochs"], judged[method, "logme"]["num_families"]) == (2, 2)
    nested = [row["finding"] for row in results["checklist"] if row["check"] == "nested"]
    assert len(nested) == len(methods) and all("(epochs of one pre-training)" in finding for finding in nested)
    assert (results["points"], results["predictions"]) == ([], [])  # of one target
    page = Elements((workdir / "report/index.html").read_text(encoding="utf-8")).text
    assert "Checklist: " in page and "list by epoch" in page and "With one target" in page
    assert "No score earned its cost" in page or "cannot be said" in page or "earned its cost" in page


def test_an_order_of_the_user_is_a_list(two_sources, tmp_path):
    config, workdir, _ = two_sources
    config = config.copy_and_resolve_references()
    config.stages, config.scores = ("scores", "report"), ("logme",)
    for name in ("checkpoints", "others", "features", "results"):
        target = tmp_path / name
        shutil.copytree(workdir / name, target) if name == "results" else target.symlink_to(workdir / name)
    config.static = ("mnist_5k/1", "digits")
    first = run_stages(config, tmp_path)
    order = {"mnist_5k/1": 0, "digits/0": -1, "digits/1": -1, "mnist_5k/0": -2}
    assert values_of(first, "static") == order
    assert any(row["score"] == "static" and row["kendall"] is not None for row in first["trust"])
    config.static = ("digits/0",)
    again = run_stages(config, tmp_path)
    assert values_of(again, "static") == {**dict.fromkeys(order, -1), "digits/0": 0}
    rest = [[row for row in rows["scores"] if row["score"] != "static"] for rows in (first, again)]
    assert rest[0] == rest[1]  # nothing else is computed again
    config.static = ()
    assert values_of(run_stages(config, tmp_path), "static") == {}
    config.static = ("digits/0", "mnist_5k/3")
    with pytest.raises(InputError, match=r"config\.static.*mnist_5k/3") as raised:
        checks.check_data(Workspace(config, tmp_path))
    assert "\n" not in str(raised.value)


def test_nets_are_counted_without_their_heads():
    nets = [MODELS["resnet10"](num_classes=c, width=8, stem="cifar") for c in (0, 10, 1000)]
    lists = []
    for net in nets:
        values = naive_values(net, 0.004 + 2 * net.feature_dim * net.num_classes / 1e9)
        lists.append(values)
        params = jax.eval_shape(net.init, jax.random.key(0))[0]
        own = sum(leaf.size for name, leaf in trees.flatten(params).items() if not name.startswith("fc/"))
        assert values["num_parameters"] == own
    assert lists[0] == lists[1] == lists[2] and lists[0]["forward_gflops"] == 0.004
    with pytest.raises(InputError, match=r"config\.static"):
        static_values(("resnet",), ("resnet10/5", "resnet18/5"))  # no part between slashes


def test_scores_do_not_depend_on_other_checkpoints(two_sources, tmp_path):
    config, workdir, results = two_sources
    work = Workspace(config, workdir)
    num_classes = work.source(TARGET, "train").num_classes
    for snapshot in work.snapshots:
        alone = extract.stack([work.features(snapshot, TARGET, "train")])
        for score in ("logme", "leep", "nleep"):
            (row,) = [r for r in results["scores"] if (r["checkpoint"], r["score"]) == (snapshot.name, score)]
            np.testing.assert_allclose(score_all(score, alone, num_classes), row["value"], rtol=1e-5)
    work.close()


def test_scores_do_not_depend_on_the_memory_budget(two_sources, tmp_path, caplog):
    config, workdir, results = two_sources
    config = config.copy_and_resolve_references()
    config.data.features_gigabytes = 1e-9
    config.stages, config.scores = ("scores",), ("logme", "leep")
    (tmp_path / "w").mkdir()
    for name in ("checkpoints", "others", "features"):
        (tmp_path / "w" / name).symlink_to(workdir / name)
    again = run_stages(config, tmp_path / "w")
    before = {(r["checkpoint"], r["score"]): r["value"] for r in results["scores"]}
    again = [row for row in again["scores"] if row["score"] in config.scores]
    assert len(again) == 8
    for row in again:
        np.testing.assert_allclose(row["value"], before[row["checkpoint"], row["score"]], rtol=1e-5)


def test_broken_features_fail_one_checkpoint_and_are_retried(tmp_path):
    config = one_epoch_config(stages=("pretrain", "features"), scores=("logme", "leep"))
    run_stages(config, tmp_path)
    work = Workspace(config, tmp_path)
    valid = {snapshot.name: work.features(snapshot, TARGET, "train") for snapshot in work.snapshots}
    broken = work.snapshots[1]
    path = tmp_path / "features" / _key(work, broken)
    whole = path.read_bytes()
    values = np.array(valid[broken.name].features)
    values[3, 2:4] = np.nan, np.inf
    cache.save(path, Features(values, valid[broken.name].logits, valid[broken.name].labels))
    work.close()
    config.stages = ("probe", "scores", "spectral", "report")
    results = run_stages(config, tmp_path)
    columns = {"transfer": "accuracy", "scores": "value", "spectral": "accuracy"}
    for rows, column in ((results[name], column) for name, column in columns.items()):
        rows = [row for row in rows if row.get("score") not in NAIVE]
        failed = [row for row in rows if row["checkpoint"] == broken.name]
        assert failed and all(row[column] is None and "hold 2 values that are NaN" in row["error"] for row in failed)
        others = [row for row in rows if row["checkpoint"] != broken.name]
        assert others and all(math.isfinite(row[column]) and not row["error"] for row in others)
    assert {(row["num_scored"], row["num_checkpoints"]) for row in results["ranking"]} == {(1, 2)}
    assert all(row["kendall"] is None and row["recall@1"] is None for row in results["ranking"])
    page = (tmp_path / "report/index.html").read_text()
    assert "What failed" in page and "train features [160, 64] hold 2 values" in page
    path.write_bytes(whole)
    repaired = run_stages(config, tmp_path)
    assert not any(row["error"] for name in columns for row in repaired[name])
    assert len(repaired["spectral"]) == 2 * 3 and len(repaired["similarity"]) == 2 * 2
    assert {(row["num_scored"], row["num_checkpoints"]) for row in repaired["ranking"]} == {(2, 2)}


def _key(work, snapshot):
    return work.features_of.path(work.checkpoint(snapshot), work.source(TARGET, "train")).name


def test_diverged_finetuning_does_not_affect_other_stages(tmp_path):
    config = one_epoch_config(stages=("pretrain", "probe", "finetune", "scores", "spectral"), scores=("finetune_1",))
    config.finetune.optimizer.learning_rate = 1e30
    results = run_stages(config, tmp_path)
    tuned = [row for row in results["transfer"] if row["method"] == "finetune"]
    tuned += [row for row in results["scores"] if row["score"] not in NAIVE]
    assert len(tuned) == 4 and all("not finite at step" in row["error"] for row in tuned)
    assert all(row["accuracy"] > 0 for row in results["transfer"] if row["method"] == "probe")
    assert {row["stage"] for row in results["spectral"]} == {"pretrained"}


@pytest.mark.parametrize(
    "existing",
    [rows for n in range(5) for rows in itertools.combinations(itertools.product((0, 1), FINETUNE_SCORES), n)],
)
def test_one_finetuning_gives_all_missing_early_stops(existing, tmp_path, monkeypatch):
    """`existing` holds (epoch of the checkpoint, score) of the rows that need not be computed."""
    work = Workspace(one_epoch_config(scores=("finetune_5", "finetune_1"), stages=("scores",)), tmp_path)
    runs = []

    def finetuned(work, todo, target, splits, tuning, epochs):
        snapshots = [run.snapshot for run in todo if run.seed == work.config.seed and not run.changes]
        assert splits == ("fit", "held_out") and tuning.epochs == work.config.finetune.epochs
        runs.append(([work.epoch(snapshot) for snapshot in snapshots], tuple(epochs)))
        for snapshot, epoch in itertools.product(snapshots, epochs):
            diverged = 99 if epoch == 5 and work.epoch(snapshot) == 1 else None
            accuracy = math.nan if diverged else epoch / 10
            metrics = {"accuracy": accuracy, "mean_class_accuracy": 0.0}
            yield Run(snapshot, 0), Finetuned(work.epoch(snapshot), epoch, metrics, float(epoch), 1.0, {}, diverged)

    monkeypatch.setattr(score_stage, "finetuned", finetuned)
    monkeypatch.setattr(work, "gigaflops_per_image", lambda snapshot: 1.0)
    rows = Rows(work.results, "scores")
    for epoch, score in existing:
        rows.append(score_stage.ScoreRow(str(epoch), epoch, TARGET, score, 0.9, 1.0, 1.0, 1.0))
    score_stage.run(work)
    found = {(row.epoch, row.score): row for row in Rows(work.results, "scores").rows if row.score not in NAIVE}
    assert found.keys() == set(itertools.product((0, 1), FINETUNE_SCORES))
    for (epoch, score), row in found.items():
        failed = (epoch, score) == (1, "finetune_5") and (epoch, score) not in existing
        assert row.error == ("the loss is not finite at step 99" if failed else "")
        expected = 0.9 if (epoch, score) in existing else math.nan if failed else FINETUNE_SCORES[score] / 10
        assert row.value == pytest.approx(expected, nan_ok=True)
    # Each checkpoint trains once, no longer than needed, and those with the same last epoch train together.
    missing = {e: {s for s in FINETUNE_SCORES if (e, s) not in existing} for e in (0, 1)}
    ends = {e: max(map(FINETUNE_SCORES.get, missing[e])) for e in (0, 1) if missing[e]}
    assert sorted(e for group, _ in runs for e in group) == sorted(ends)
    assert sorted(max(epochs) for _, epochs in runs) == sorted(set(ends.values()))
    assert all(ends[e] == max(epochs) for group, epochs in runs for e in group)
    work.close()


def test_one_finetuning_covers_all_seeds_and_checkpoints(tmp_path, monkeypatch):
    work = Workspace(one_epoch_config(finetune__num_seeds=3, pretrain__epochs=2, trajectory__epochs="all"), tmp_path)
    calls = []

    def finetune(checkpoints, candidates, *_, **__):
        calls.append(candidates)
        for index in range(len(candidates)):
            yield Finetuned(index, 1, {"accuracy": 0.5, "mean_class_accuracy": 0.5}, 1.0, 1.0, {}, None)

    monkeypatch.setattr(finetune_stage, "finetune", finetune)
    work.config.stages = ("finetune",)
    finetune_stage.run(work)
    assert [(c.checkpoint, c.seed) for c in calls[0]] == [
        (f"checkpoint {epoch}", seed) for seed in range(3) for epoch in range(3)
    ]
    assert len(calls) == 1 and len(Rows(work.results, "transfer").rows) == 9
    work.close()


@pytest.mark.parametrize("epochs", [(), (1,), (1, 5)])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("devices_each", [1, 2])
def test_every_process_yields_each_result_once(processes, devices_each, epochs, tmp_path, monkeypatch):
    work = Workspace(one_epoch_config(pretrain__epochs=4, trajectory__epochs="all"), tmp_path)
    names = [snapshot.name for snapshot in work.snapshots]
    tested = epochs or (9,)

    def stream(process):
        """Yields what `finetune` yields in a process: checkpoints side by side, epoch by epoch."""
        mine = range(len(names[process::processes]))
        for first in range(0, len(mine), devices_each):
            for epoch, index in itertools.product(tested, mine[first : first + devices_each]):
                yield Finetuned(index, epoch, {"accuracy": float(names[process::processes][index])}, 1.0, 1.0, {}, None)

    for process in range(processes):
        rounds = itertools.zip_longest(*map(stream, range(processes)))
        monkeypatch.setattr(finetune_stage.jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(finetune_stage.jax, "process_count", lambda: processes)
        monkeypatch.setattr(devices, "make_mesh", lambda **_: work.mesh)
        monkeypatch.setattr(finetune_stage, "finetune", lambda *_, process=process, **__: stream(process))

        def gather(own, process=process, rounds=rounds):
            found = [done and {**vars(done), "model": None} for done in next(rounds)]
            assert found[process] == own
            return found

        monkeypatch.setattr(devices, "gather", gather)
        todo = [Run(snapshot, 0) for snapshot in work.snapshots]
        tuning = settings.finetune_settings(work.config, TARGET)
        found = finetune_stage.finetuned(work, todo, TARGET, ("fit", "held_out"), tuning, epochs=epochs)
        seen = [(run.snapshot.name, done.epoch, done.metrics["accuracy"]) for run, done in found]
        assert sorted(seen) == [(name, epoch, float(name)) for name in names for epoch in tested]
        assert next(rounds, None) is None
    work.close()


SHORT = [
    (
        {"finetune__epochs": 4},
        r"config\.finetune\.epochs = 4: finetune_5 .* at least 5 epochs, or leave finetune_5 out",
    ),
    ({"finetune__epochs": 1}, r"config\.finetune\.epochs = 1: finetune_5"),
    ({"finetune__epochs": 9, "override": {"epochs": 3}}, r"config\.overrides\['embedded.*'\]\.finetune\.epochs = 3"),
    ({"finetune__epochs": 4, "override": {"batch_size": 16}}, r"config\.finetune\.epochs = 4"),
]


@pytest.mark.parametrize(("changes", "message"), SHORT)
def test_schedule_shorter_than_its_early_stop_is_refused(changes, message):
    changes, override = {**changes}, changes.get("override")
    changes.pop("override", None)
    config = one_epoch_config(scores=("logme", "finetune_1", "finetune_5"), **changes)
    if override:
        config.overrides = {TARGET: {"finetune": override}}
    with pytest.raises(InputError, match=message):
        checks.check(config)
    config.scores = ("logme", "finetune_1")
    checks.check(config)
    config.scores, config.stages = ("finetune_5",), ("probe", "finetune")  # no stage computes it
    checks.check(config)


def test_schedule_of_exactly_five_epochs_is_accepted():
    checks.check(one_epoch_config(scores=("finetune_5",), finetune__epochs=5))


@pytest.mark.parametrize("batch_size", [8, 32])
@pytest.mark.parametrize("score", FINETUNE_SCORES)
@pytest.mark.parametrize("where", ["config.finetune", f"config.overrides['{TARGET}'].finetune"])
def test_schedule_in_steps_is_checked_against_its_images(batch_size, score, where, tmp_path):
    config = one_epoch_config(scores=(score,), finetune__epochs=1, finetune__batch_size=batch_size)
    fit = 4 * 160 // 5  # training uses four fifths of the 160 images
    least = FINETUNE_SCORES[score] * (fit // batch_size)
    for steps in (least - 1, least, least + 1):
        if "overrides" in where:
            config.overrides = {TARGET: {"finetune": {"steps": steps}}}
        else:
            config.finetune.steps = steps
        checks.check(config)
        work = Workspace(config, tmp_path)
        if steps >= least:
            checks.check_data(work)
            continue
        with pytest.raises(InputError, match="give it at least") as raised:
            checks.check_data(work)
        message = str(raised.value)
        assert f"{where}.steps = {steps}: {score}" in message and f"at least {least} steps" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.full((20, 4), np.inf, np.float32)}, r"features \[20, 4\] hold 80 values"),
        ({"features": np.ones((19, 4), np.float32)}, r"features \[19, 4\] do not match 20 labels"),
        ({"logits": np.full((20, 3), np.nan, np.float32)}, "logits"),
        ({"labels": np.full(20, 7, np.int32)}, r"labels lie in \[7, 7\], expected 0 to 2"),
    ],
)
def test_problem_names_the_argument(change, message):
    valid = {"features": np.eye(20, 4, dtype=np.float32), "logits": np.ones((20, 3), np.float32)}
    valid["labels"] = np.arange(20, dtype=np.int32) % 3
    assert extract.problem(Features(**valid), 3) == ""
    assert re.match(rf"{message}", extract.problem(Features(**{**valid, **change}), 3))


def test_linear_scores_and_fine_tuning_share_the_held_out_images(monkeypatch):
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(100) % 4).astype(np.int32)
    means = 9 * rng.normal(size=(4, 6))
    x = (means[y] + rng.normal(size=(100, 6))).astype(np.float32)
    held_out = stratified_split(y)[1]
    x[held_out] = means[(y[held_out] + 1) % 4]  # only on these is the accuracy 0
    source = types.SimpleNamespace(labels=y, num_classes=4)
    work = types.SimpleNamespace(
        source=lambda dataset, split: source, features=lambda snapshot, dataset, split: Features(x, x, y)
    )
    monkeypatch.setattr(score_stage.groups, "by_feature_dim", lambda work, snapshots, dataset: [snapshots])
    for name in ("linear_1", "linear_converged"):
        ((_, measured),) = score_stage._by_features(work, ["5"], TARGET, name, {6: 1.0})
        assert measured["value"] == 0


def test_too_few_samples_give_nan_and_a_reason():
    features = Features(np.random.default_rng(0).normal(size=(1, 20, 4)), np.ones((1, 20, 3)), np.arange(20)[None] % 5)
    assert np.isnan(score_all("nleep", features, 5)).all()
    one = Features(features.features[0], features.logits[0], features.labels[0])
    assert "20 samples for 25 Gaussians" in why_undefined("nleep", one, 5)


@pytest.mark.parametrize("name", [name for name in SCORES if not name.startswith("mi_") or name == "mi_alpha_0.5"])
def test_score_all_equals_one_by_one(name):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 90, 8)).astype(np.float32), np.tile(np.arange(90, dtype=np.int32) % 3, (3, 1))
    x += 2 * np.eye(8, dtype=np.float32)[y]
    each = [SCORES[name](Features(x[i], x[i], y[i]), 3) for i in range(3)]
    np.testing.assert_allclose(score_all(name, Features(x, x, y), 3), each, rtol=1e-5)
