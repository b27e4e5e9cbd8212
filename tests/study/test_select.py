"""The stage "select", and fine-tuning that reuses what it selects."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from helpers.studies import one_epoch_config, run_stages
from jax_transfer.data.source import subset
from jax_transfer.data.sources import load_source
from jax_transfer.features.extract import make_forward
from jax_transfer.features.means import class_means, on_device
from jax_transfer.fields import to_json
from jax_transfer.records import InputError
from jax_transfer.results import TEST, VALIDATION, Rows, picture
from jax_transfer.study import checks, report, reuse, runner, select
from jax_transfer.study.config import default_config, differences, with_earlier_entries
from jax_transfer.study.select import selected_images
from jax_transfer.study.settings import finetune_settings
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.objectives import REUSE
from jax_transfer.transfer.finetune import Reuse

SOURCE = "embedded:mnist_5k?train=300&test=60"
TARGET = "embedded:digits?train=160&test=64"
SELECTIONS = {
    "uot": {"strategy": "uot", "num_selected": 3},
    "next": {"strategy": "uot", "first": 4, "num_selected": 3},
    "greedy": {"strategy": "greedy_ot", "num_selected": 3},
    "random": {"strategy": "random", "num_selected": 3},
    "labels": {"strategy": "labels"},
    "clusters": {"strategy": "uot", "kind": "cluster", "num_clusters": 12, "num_selected": 4},
}
WAYS = (
    {"objective": "joint", "selection": "uot", "source_weights": (0.1, 1.0)},
    {"objective": "joint", "selection": "random", "batch_size": 16, "only_selected_classes": True},
    {"objective": "weak_strong", "selection": "clusters"},
    {"objective": "cotuning", "source_weights": (2.3,)},
)


def reuse_config(**changes):
    defaults = {
        "stages": ("pretrain", "select", "finetune"),
        "trajectory__epochs": "1",
        "select__dataset": SOURCE,
        "select__selections": SELECTIONS,
        "select__labels": {TARGET: ("3", "8")},
        "finetune__reuse": WAYS,
        "finetune__steps": 4,
        "finetune__num_seeds": 2,
    }
    return one_epoch_config(**{**defaults, **changes})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The working directory and the rows of a study that selects and reuses source images in all ways."""
    workdir = tmp_path_factory.mktemp("reuse")
    return workdir, run_stages(reuse_config(), workdir)


def test_selections_have_a_row_for_each_selected_class_or_cluster(study):
    _, rows = study
    ranks = {name: [r["rank"] for r in rows["selection"] if r["strategy"] == name] for name in SELECTIONS}
    assert ranks == {
        "uot": [1, 2, 3],
        "next": [4, 5, 6],
        "greedy": [1, 2, 3],
        "random": [1, 2, 3],
        "labels": [1, 2],
        "clusters": [1, 2, 3, 4],
    }
    assert [r["class"] for r in rows["selection"] if r["strategy"] == "labels"] == ["3", "8"]
    for row in rows["selection"]:
        assert row["kind"] == ("cluster" if row["strategy"] == "clusters" else "class")
        assert (row["similarity"] is None) == (row["strategy"] in ("random", "labels"))
        assert row["num_images"] > 0 and row["converged"]
    similar = [r["similarity"] for name in ("uot", "next") for r in rows["selection"] if r["strategy"] == name]
    assert similar == sorted(similar, reverse=True)


def test_every_way_of_reuse_has_results_for_all_seeds(study):
    _, rows = study
    results = {
        (r["objective"], r["selection"], r["seed"]): r
        for r in rows["transfer"]
        if r["split"] == TEST and not r["error"]
    }
    ways = [("supervised", None), *((way["objective"], way.get("selection")) for way in WAYS)]
    assert list(results) == [(*way, seed) for way in ways for seed in (0, 1)]
    assert results["supervised", None, 0]["source_weight"] is None
    assert results["cotuning", None, 0]["source_weight"] == 2.3
    assert all(0 <= row["accuracy"] <= 1 for row in results.values())


def test_source_weight_is_chosen_on_validation(study):
    _, rows = study
    joint = [row for row in rows["transfer"] if (row["objective"], row["selection"]) == ("joint", "uot")]
    tried = {row["source_weight"]: row["accuracy"] for row in joint if row["split"] == VALIDATION}
    assert list(tried) == [0.1, 1.0]
    best = max(tried, key=tried.get)
    assert [row["source_weight"] for row in joint if row["split"] == TEST] == [best, best]


def test_second_run_changes_nothing(study):
    workdir, _ = study
    before = {path: path.read_bytes() for path in (workdir / "results").glob("*.jsonl")}
    run_stages(reuse_config(), workdir)
    assert {path: path.read_bytes() for path in (workdir / "results").glob("*.jsonl")} == before


@pytest.mark.parametrize("kept", [2, 11])
def test_selection_resumes_after_any_row(study, kept, tmp_path):
    workdir, rows = study
    (tmp_path / "results").mkdir()
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    lines = (workdir / "results/selection.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results/selection.jsonl").write_text("".join(lines[:kept]))
    again = run_stages(reuse_config(stages=("select",)), tmp_path)["selection"]
    assert again == rows["selection"]


def test_selected_images_are_all_images_of_the_selected_classes(study):
    workdir, rows = study
    work = Workspace(reuse_config(), workdir)
    (snapshot,) = work.snapshots
    source = work.source(SOURCE, "train")
    for name in ("uot", "labels"):
        chosen = [row["label"] for row in rows["selection"] if row["strategy"] == name]
        selected = selected_images(work, snapshot, TARGET, name)
        np.testing.assert_array_equal(selected, np.flatnonzero(np.isin(source.labels, chosen)))
        part = work.part(SOURCE, selected.tobytes(), renumber=False)
        assert part is work.part(SOURCE, selected.tobytes(), renumber=False)  # so that its feed is read once
        assert part.num_classes == source.num_classes and set(part.labels.tolist()) == set(chosen)
    clusters = selected_images(work, snapshot, TARGET, "clusters")
    assert len(clusters) == sum(row["num_images"] for row in rows["selection"] if row["strategy"] == "clusters")
    work.close()


def test_every_selection_has_a_picture(study):
    workdir, rows = study
    for row in rows["selection"]:
        with Image.open(picture(workdir / "results", row["checkpoint"], TARGET, row["strategy"])) as image:
            assert image.width == 8 * 64


def test_class_means_equal_those_of_all_features(study):
    workdir, _ = study
    work = Workspace(reuse_config(), workdir)
    checkpoint, feed = work.checkpoint(work.snapshots[0]), work.feed(SOURCE, "train", work.preprocessing)
    forward = make_forward(checkpoint.net, checkpoint.preprocessing, work.mesh)
    means, counts = class_means(forward, checkpoint.model, feed, work.mesh, 64)
    x = np.asarray(on_device(forward, checkpoint.model, feed, work.mesh, 64))
    assert x.shape == (len(feed.source), checkpoint.net.feature_dim)
    for label in range(10):
        own = x[feed.source.labels == label]
        assert counts[label] == len(own)
        np.testing.assert_allclose(means[label], own.mean(0), rtol=1e-5, atol=1e-6)
    work.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A source and a target, as folders of photographs-like images; two source images are copies of test images."""
    root, generator = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)

    def image(path, pixels, **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, **options)
        return pixels

    def pixels():
        coarse = generator.integers(0, 255, (6, 6, 3), np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC))

    tests = []
    for name in ("a", "b"):
        for i in range(8):
            image(root / "target/train" / name / f"{i}.png", pixels())
            tests.append(image(root / "target/test" / name / f"{i}.png", pixels()))
            image(root / "source/train" / name / f"{i}.png", pixels())
        image(root / "source/test" / name / "0.png", pixels())
    image(root / "source/train/a/copy.jpg", tests[0], quality=80)
    image(root / "source/train/b/copy.jpg", np.asarray(Image.fromarray(tests[9]).resize((40, 40))), quality=90)
    return f"folder:{root / 'source'}", f"folder:{root / 'target'}"


def test_copies_of_test_images_are_listed_and_left_out(folders, tmp_path):
    source, target = folders
    config = reuse_config(
        targets=(target,),
        stages=("pretrain", "select"),
        select__dataset=source,
        select__selections={"uot": {"strategy": "uot", "num_selected": 2}},
        select__labels={},
        select__exclude_duplicates=True,
        finetune__reuse=(),
        preprocessing__image_size=16,
    )
    rows = run_stages(config, tmp_path)
    work = Workspace(config, tmp_path)
    copies = [i for i, row in enumerate(work.source(source, "train").labels) if i in (8, 17)]
    assert sorted(row["source_image"] for row in rows["overlap"]) == copies
    assert sorted(row["test_image"] for row in rows["overlap"]) == [0, 9]
    assert len(selected_images(work, work.snapshots[0], target, "uot")) == 16
    config.select.exclude_duplicates = False
    assert len(selected_images(work, work.snapshots[0], target, "uot")) == 18
    work.close()


def test_joint_trains_on_the_whole_source_head_or_only_on_the_selected_classes(study):
    workdir, _ = study
    work = Workspace(reuse_config(), workdir)
    tuning, mesh = finetune_settings(work.config, TARGET), work.mesh
    (snapshot,) = work.snapshots
    net = work.tuned_net(snapshot, TARGET)
    sizes = []
    for only in (False, True):
        way = Reuse("joint", "random", only_selected_classes=only)
        needed = reuse.training(work, snapshot, TARGET, "train", net, tuning, way, mesh)
        params, _ = jax.eval_shape(
            lambda key, n=needed: n.make_objective(source_weight=1.0).init(key), jax.random.key(0)
        )
        sizes.append(params["source_head"]["bias"].shape[0])
    assert sizes == [10, 3]
    work.close()


def test_selections_and_ways_may_be_added_or_left_out_but_not_changed():
    before = to_json(reuse_config())
    fewer = reuse_config(finetune__reuse=(), select__selections={"next": {**SELECTIONS["next"], "kind": "class"}})
    assert differences(before, to_json(fewer)) == []  # a default may be written out
    kept = with_earlier_entries(before, to_json(fewer))
    assert differences(before, kept) == [] and set(kept["select"]["selections"]) == set(SELECTIONS)
    assert len(kept["finetune"]["reuse"]) == len(WAYS)
    more = reuse_config(
        finetune__reuse=WAYS[:2], select__selections={**SELECTIONS, "all": {"strategy": "uot", "num_selected": 10}}
    )
    assert differences(before, to_json(more)) == []
    changed = reuse_config(select__selections={**SELECTIONS, "uot": {"strategy": "uot", "num_selected": 4}})
    assert differences(before, to_json(changed)) == ["config.select.selections.uot.num_selected was 3, is 4"]
    weights = [{**WAYS[0], "source_weights": (0.5,)}, *WAYS[1:]]
    assert (
        "config.finetune.reuse.joint with uot.source_weights"
        in differences(before, to_json(reuse_config(finetune__reuse=tuple(weights))))[0]
    )


def test_ways_are_named_by_objective_and_selection():
    assert [str(way) for way in finetune_settings(reuse_config(), TARGET).reuse] == [
        "joint with uot",
        "joint with random",
        "weak_strong with clusters",
        "cotuning",
    ]


def way(**fields):
    return {"finetune__reuse": (fields,)}


def selection(**fields):
    return {"select__selections": {**SELECTIONS, "x": fields}}


REFUSED = [
    (way(objective="joint"), r"reuse\[0\]: joint trains on source images; name a selection: clusters, greedy"),
    (way(objective="joint", selection="uto"), r"selection \(config\.finetune\.reuse\[0\]\.selection\): 'uto'.*'uot'"),
    (way(objective="join", selection="uot"), r"config\.finetune\.reuse\[0\]\.objective\): 'join'"),
    (way(selection="uot"), r"config\.finetune\.reuse\[0\] lacks objective"),
    ({"finetune__reuse": (WAYS[0], WAYS[0])}, r"config\.finetune\.reuse lists 'joint with uot' twice"),
    (way(objective="cotuning", selection="uot"), "cotuning trains on no source images"),
    (
        way(objective="weak_strong", selection="uot", only_selected_classes=True),
        "weak_strong has no head for the source",
    ),
    (way(objective="joint", selection="uot", source_weights=()), "source_weights is empty"),
    ({"finetune__augment": ("mixup",)}, "weak_strong compares two views of an image, which .* mixes .* by 'mixup'"),
    ({"select__exclude_duplicates": True, "select__find_duplicates": False}, "duplicates must be found to"),
    (selection(strategy="ott"), r"strategy \(config\.select\.selections\['x'\]\.strategy\): 'ott'"),
    ({"select__selections": {}, "finetune__reuse": ()}, r"config\.select\.selections is empty"),
    (selection(strategy="labels", kind="cluster"), "clusters have none"),
    (selection(kind="cluster", num_clusters=5), "ranks up to 100 of num_clusters"),
    (selection(strategy="labels", num_selected=50), "num_selected = 50, but strategy 'labels' does not use it"),
    (selection(strategy="random", metric="l2"), "metric = 'l2', but strategy 'random' does not use it"),
    (selection(strategy="greedy_ot", epsilon=2.0), "epsilon = 2.0, but strategy 'greedy_ot' does not use it"),
    (selection(num_clusters=5), "num_clusters = 5, but strategy 'uot' with classes does not use it"),
    ({"select__labels": {"tfds:pets": ("cat",)}}, r"config\.select\.labels; it must be one of config\.targets"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_bad_settings_are_refused_before_anything_runs(changes, message):
    with pytest.raises(InputError, match=message):
        checks.check(reuse_config(**changes))


REFUSED_WITH_DATA = [
    (selection(strategy="uot"), r"ranks up to 100, but .* has 10 classes"),
    ({"select__labels": {TARGET: ("dog",)}}, r"class of embedded:mnist_5k.*config\.select\.labels.*'dog'"),
    (selection(kind="cluster"), r"num_clusters = 2000: .* only 300 training images"),
    ({"select__dataset": "embedded:mnist_5k?classes=3"}, "has a single class, so there are no classes to select from"),
    (
        {
            "select__dataset": "embedded:mnist_5k?classes=3",
            "select__selections": {"uot": SELECTIONS["clusters"]},
            "select__labels": {},
            "finetune__reuse": WAYS[:1],
        },
        "joint with uot needs labels of the source images",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED_WITH_DATA)
def test_selections_that_the_source_does_not_suit_are_refused(changes, message, tmp_path):
    work = Workspace(reuse_config(**changes), tmp_path)
    with pytest.raises(InputError, match=message):
        checks.check_data(work)
    work.close()


def test_cotuning_refuses_a_checkpoint_without_head(tmp_path):
    config = reuse_config(stages=("select", "finetune"), checkpoints=("random:resnet10?width=4&stem=cifar",))
    work = Workspace(config, tmp_path)
    with pytest.raises(
        InputError, match=r"cotuning .* needs the classification head .* random resnet10.* does not have"
    ):
        checks.check_data(work)
    work.close()


def test_reuse_without_a_selection_names_the_stage(study, tmp_path):
    workdir, _ = study
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    work = Workspace(reuse_config(stages=("finetune",)), tmp_path)
    with pytest.raises(InputError, match='has not been made: add "select" to'):
        checks.check_data(work)
    work.close()


def test_too_few_selected_images_for_a_batch_are_refused_by_name(study, tmp_path):
    workdir, _ = study
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    one_class = {"uot": {"strategy": "uot", "num_selected": 1}}
    ways = ({"objective": "joint", "selection": "uot", "batch_size": 100},)
    config = reuse_config(stages=("select", "finetune"), select__selections=one_class, finetune__reuse=ways)
    with pytest.raises(
        InputError, match=r"uot: selection 'uot' holds \d+ images of .*, fewer than the 100 of a step: set a"
    ):
        run_stages(config, tmp_path)


def test_projections_are_refused_where_there_are_none(study):
    workdir, _ = study
    work = Workspace(reuse_config(select__representation="projection"), workdir)
    with pytest.raises(InputError, match="supervised pre-training has no projection; use config"):
        checks.check_data(work)
    work.close()


def test_page_says_that_dogs_are_images_of_imagenet(tmp_path, monkeypatch):
    config = reuse_config()
    work = Workspace(config, tmp_path)
    config.select.dataset, dogs = "tfds:imagenet2012", work.source(TARGET, "train")
    config.targets = ("tfds:stanford_dogs",)
    monkeypatch.setattr(work, "source", lambda *_: dogs)
    report.record_targets(work)
    (row,) = Rows(work.results, "targets").rows
    assert any("Stanford Dogs" in note and "ImageNet" in note for note in row.notes)
    work.close()


def test_class_without_images_is_named(study, tmp_path):
    workdir, _ = study
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    config = reuse_config(stages=("select",), finetune__reuse=(), select__selections={"uot": SELECTIONS["uot"]})
    work = Workspace(config, tmp_path)
    train, read = work.source(SOURCE, "train"), work.caches["source"]
    without = subset(train, np.flatnonzero(train.labels != 7))
    work.caches["source"] = lambda *key: without if key == (SOURCE, "train") else read(*key)
    with pytest.raises(InputError, match=r"class '7' of embedded:mnist_5k.* has no training images"):
        select.run(work)
    work.close()


def test_selection_from_other_clusters_is_refused(study, tmp_path):
    workdir, _ = study
    (tmp_path / "results").mkdir()
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    text = (workdir / "results/selection.jsonl").read_text()
    (tmp_path / "results/selection.jsonl").write_text(text.replace('"made_from": "', '"made_from": "x'))
    with pytest.raises(InputError, match="was made with other settings, or from other classes or clusters"):
        run_stages(reuse_config(stages=("select",)), tmp_path)


def test_unset_source_weight_is_the_usual_one_of_the_objective():
    tuning = finetune_settings(reuse_config(), TARGET)
    weights = {name: reuse.points(tuning, Reuse(name))[0]["source_weight"] for name in REUSE}
    assert weights == {"joint": 1.0, "weak_strong": 1.0, "cotuning": 2.3}


def test_larger_random_selection_contains_a_smaller_one(study, tmp_path):
    workdir, _ = study
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    selections = {str(count): {"strategy": "random", "num_selected": count} for count in (3, 6)}
    config = reuse_config(stages=("select",), select__selections=selections, finetune__reuse=())
    rows = run_stages(config, tmp_path)["selection"]
    few, many = ([row["label"] for row in rows if row["strategy"] == name] for name in ("3", "6"))
    assert many[:3] == few


def test_random_selections_of_two_targets_differ(tmp_path):
    other = "embedded:digits?train=100&test=64"
    selections = {"random": {"strategy": "random", "num_selected": 5}}
    config = reuse_config(
        targets=(TARGET, other), stages=("pretrain", "select"), select__selections=selections, finetune__reuse=()
    )
    run_stages(config, tmp_path)
    rows = Rows(tmp_path / "results", "selection").rows
    by_target = {target: [row.label for row in rows if row.target == target] for target in (TARGET, other)}
    assert by_target[TARGET] != by_target[other]


def test_wanted_names_are_those_that_source_and_target_share_by_default(study, tmp_path):
    workdir, _ = study
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    selections = {"labels": {"strategy": "labels"}}
    config = reuse_config(stages=("select",), select__selections=selections, select__labels={}, finetune__reuse=())
    rows = run_stages(config, tmp_path)["selection"]
    names = load_source(SOURCE, "train").class_names
    assert [json.loads(json.dumps(row["class"])) for row in rows] == list(names)


def test_all_numbers_of_clusters_are_found_in_the_same_features(study, tmp_path, monkeypatch):
    workdir, rows = study
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    calls = []
    monkeypatch.setattr(select, "on_device", lambda *args, **kwargs: calls.append(1) or on_device(*args, **kwargs))
    fewer = {**SELECTIONS["clusters"], "num_clusters": 6}
    selections = {"fewer": fewer, "clusters": SELECTIONS["clusters"]}
    config = reuse_config(stages=("select",), select__selections=selections, finetune__reuse=())
    found = run_stages(config, tmp_path)["selection"]
    assert len(calls) == 1
    alone = [row for row in rows["selection"] if row["strategy"] == "clusters"]
    assert [row for row in found if row["strategy"] == "clusters"] == alone
    assert max(row["label"] for row in found if row["strategy"] == "fewer") < 6


def test_source_with_fewer_images_than_a_step_is_refused_before_anything_runs(tmp_path):
    ways = ({"objective": "joint", "selection": "uot", "batch_size": 400},)
    work = Workspace(reuse_config(finetune__reuse=ways), tmp_path)
    with pytest.raises(InputError, match=r"the source has 300 images of .*, fewer than the 400 of a step: set a"):
        checks.check_data(work)


def test_a_study_that_its_checks_refused_may_change_its_config(tmp_path):
    refused = reuse_config(finetune__reuse=({"objective": "joint", "selection": "uot", "batch_size": 400},))
    with pytest.raises(InputError, match="fewer than the 400"):
        runner.run(refused, tmp_path)
    runner.open_workdir(reuse_config(finetune__reuse=({"objective": "joint", "selection": "uot"},)), tmp_path).close()
    (tmp_path / "results/transfer.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"was made with another config: config.* was .*\. Use that config again"):
        runner.open_workdir(refused, tmp_path)
    with pytest.raises(InputError, match=r"; and \d+ more fields\. Use") as error:
        runner.open_workdir(default_config(), tmp_path)
    assert len(str(error.value)) < 1200


def test_a_search_that_finds_no_copies_leaves_an_empty_file(study):
    workdir, rows = study
    assert rows["overlap"] == [] and (workdir / "results/overlap.jsonl").read_bytes() == b""
