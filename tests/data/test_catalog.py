"""The catalog: images that data sets are known to share, and the targets of the paper on reusing pre-training data."""

import pytest
import tensorflow_datasets as tfds

from jax_transfer.data.catalog import CATALOG, KNOWN_OVERLAPS, find, known_overlap
from jax_transfer.data.tfds_sets import load_tfds
from jax_transfer.records import InputError

REUSE = ("stanford_dogs", "stanford_cars", "cub200", "pets", "sun397", "aircraft", "dtd", "caltech101")


def test_the_targets_of_the_paper_are_in_the_catalog():
    assert set(REUSE) <= set(CATALOG)
    classes = {name: CATALOG[name].num_classes for name in REUSE}
    assert list(classes.values()) == [120, 196, 200, 37, 397, 100, 47, 102]


@pytest.mark.parametrize("name", ("sun397/standard-part1-120k", "sun397/standard-part1-120k:4.0.0", "sun397_part1"))
def test_a_configuration_of_its_own_is_found_before_the_builder(name):
    assert find(name) == CATALOG["sun397_part1"] != find("sun397/tfds") == find("sun397") == CATALOG["sun397"]


@pytest.mark.parametrize("name", ("inaturalist2017", "inaturalist2018"))
def test_sets_for_pre_training_have_the_classes_of_their_builders(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    entry = CATALOG[name]
    assert tfds.builder_cls(entry.tfds)(data_dir=tmp_path).info.features["label"].num_classes == entry.num_classes
    assert (entry.train, entry.test) == ("train", "validation")  # their test images have no labels
    with pytest.raises(InputError, match=f"is not on disk .* python -m jax_transfer.data.prepare {name}"):
        load_tfds(name, "train", "raise")


@pytest.mark.parametrize("pair", KNOWN_OVERLAPS)
def test_known_overlaps_are_sentences_on_the_catalog(pair):
    sentence = KNOWN_OVERLAPS[pair]
    assert set(pair) <= set(CATALOG) and sentence.endswith(".") and "\n" not in sentence and "leakage" in sentence
    assert known_overlap(*(f"tfds:{name}" for name in pair)) == sentence


@pytest.mark.parametrize("target", ("stanford_dogs", "stanford_dogs:0.2.0", "stanford_dogs?fraction=0.5&test=10"))
@pytest.mark.parametrize("source", ("imagenet2012", "imagenet2012:5.1.0", "imagenet2012?train=1000"))
def test_options_and_versions_do_not_hide_an_overlap(source, target):
    assert "78.64 to 88.14" in known_overlap(f"tfds:{source}", f"tfds:{target}")


@pytest.mark.parametrize(
    "pair",
    [
        ("tfds:imagenet2012", "folder:stanford_dogs"),
        ("folder:imagenet2012", "tfds:stanford_dogs"),
        ("tfds:stanford_dogs", "tfds:imagenet2012"),
        ("tfds:imagenet2012", "tfds:caltech101"),
        ("tfds:tiny_imagenet", "tfds:caltech101"),
        ("tfds:unknown", "tfds:other"),
        ("folder:a", "folder:a"),
        ("", ""),
    ],
)
def test_nothing_is_claimed_of_other_pairs(pair):
    assert known_overlap(*pair) == ""
