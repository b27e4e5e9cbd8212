"""Ranks and recalls of retrieval against plain numpy, ties included; folds, chance, memory and bad input."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_transfer.records import InputError
from jax_transfer.training.objectives.pvse_losses import multi_instance_similarities
from jax_transfer.transfer import retrieval as module
from jax_transfer.transfer.retrieval import Retrieval, chance_recall, ranks, retrieval, shared_captions


def plain_ranks(queries, items, query_ids, item_ids):
    """Ranks one query at a time, in float64."""
    found = []
    for query, own in zip(queries.astype(np.float64), query_ids, strict=True):
        similarity = np.array([max(a @ b for a, b in itertools.product(query, item)) for item in items])
        best = max(similarity[item_ids == own], default=-math.inf)
        found.append(sum(similarity[item_ids != own] >= best))
    return found


def whole_numbers(shape, seed):
    """Returns embeddings of -1, 0 and 1, whose inner products are exact and often equal."""
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.float32)


def random_pairs(n, captions, k=2, e=16, noise=1.0, seed=0):
    """Returns images, captions that resemble their image, in a random order, and their owners."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(n, k, e))
    owner = rng.permutation(np.concatenate([np.arange(n), rng.integers(0, n, captions - n)]))
    texts = images[owner] + noise * rng.normal(size=(captions, k, e))
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts)]
    return unit[0].astype(np.float32), unit[1].astype(np.float32), owner


@pytest.mark.parametrize(("k", "l", "seed"), [(1, 1, 0), (2, 2, 1), (3, 2, 2)])
@pytest.mark.parametrize("block", [4, 1000])  # of queries
def test_ranks_equal_one_query_at_a_time_in_numpy_with_ties(k, l, seed, block, monkeypatch):
    n, m = 13, 38
    monkeypatch.setattr(module, "TILE_BYTES", block * 4 * k * l * m)
    ranks.clear_cache()
    images, captions = whole_numbers((n, k, 5), seed), whole_numbers((m, l, 5), seed + 10)
    owner = np.random.default_rng(seed).integers(0, n, m)
    owner[:n] = np.arange(n)
    there = ranks(images, captions, np.arange(n), owner)
    np.testing.assert_array_equal(there, plain_ranks(images, captions, np.arange(n), owner))
    back = ranks(captions, images, owner, np.arange(n))
    np.testing.assert_array_equal(back, plain_ranks(captions, images, owner, np.arange(n)))
    assert there.dtype == jnp.int32 and len(set(np.asarray(back).tolist())) > 5
    ranks.clear_cache()


def test_recalls_of_random_embeddings_equal_numpy():
    images, captions, owner = random_pairs(60, 170, noise=1.5)
    result = retrieval(images, captions, owner)
    places = {
        "image_to_text": np.array(plain_ranks(images, captions, np.arange(60), owner)),
        "text_to_image": np.array(plain_ranks(captions, images, owner, np.arange(60))),
    }
    for name, found in places.items():
        expected = {cutoff: float((found < cutoff).mean()) for cutoff in (1, 5, 10)}
        assert getattr(result, name).recalls == pytest.approx(expected)
        assert getattr(result, name).median_rank == np.median(found) + 1
        assert 0.05 < expected[1] < expected[5] < expected[10] < 1
    six = [*result.image_to_text.recalls.values(), *result.text_to_image.recalls.values()]
    assert result.rsum == pytest.approx(sum(six)) and (result.num_images, result.num_captions) == (60, 170)


def test_similarity_is_that_of_the_loss():
    """The order by `multi_instance_similarities` gives the same ranks."""
    images, captions, owner = random_pairs(9, 20)
    similarity = np.asarray(multi_instance_similarities(images, captions))
    best = np.where(owner == np.arange(9)[:, None], similarity, -np.inf).max(1, keepdims=True)
    expected = ((similarity >= best) & (owner != np.arange(9)[:, None])).sum(1)
    np.testing.assert_array_equal(ranks(images, captions, np.arange(9), owner), expected)


def test_collapsed_embeddings_find_nothing():
    images, captions, owner = random_pairs(20, 50)
    result = retrieval(np.broadcast_to(images[:1], images.shape), np.broadcast_to(captions[:1], captions.shape), owner)
    assert result.rsum == 0 < result.chance_rsum
    assert result.text_to_image.median_rank == 20


@pytest.mark.parametrize(("n", "m", "k", "e"), [(1, 37, 1, 17), (1, 1003, 1, 1024), (5, 130, 2, 64), (33, 37, 2, 1024)])
@pytest.mark.parametrize("length", [1e-3, 1.0, 50.0])
def test_equal_items_tie_wherever_they_are(n, m, k, e, length):
    """Whatever the rounding of a matrix product: matrices at whose edges XLA on CPU sums up in another order."""
    rng = np.random.default_rng(0)
    item = (length * rng.normal(size=(1, k, e))).astype(np.float32)
    for queries in (rng.normal(size=(n, k, e)).astype(np.float32), np.repeat(item, n, 0)):
        found = ranks(queries, np.repeat(item, m, 0), np.arange(n) * 7 % m, np.arange(m))
        np.testing.assert_array_equal(found, np.full(n, m - 1))


def test_a_tolerance_above_rounding_is_no_tie():
    query = np.array([[[0.6, 0.8]]], np.float32)
    items = np.array([[[1.0, 0.0]], [[0.99999, 0.0]]], np.float32)
    assert ranks(query, items, np.array([0]), np.arange(2)).tolist() == [0]
    assert ranks(query, items, np.array([1]), np.arange(2)).tolist() == [1]


def test_order_of_captions_changes_nothing_and_every_matching_caption_counts():
    images, captions, owner = random_pairs(30, 90)
    order = np.random.default_rng(1).permutation(90)
    result = retrieval(images, captions, owner)
    assert retrieval(images, captions[order], owner[order]) == result
    # The best caption of each image alone gives the same images the same ranks, or better ones.
    own = [np.flatnonzero(owner == i) for i in range(30)]
    similarity = np.asarray(multi_instance_similarities(images, captions))
    best = np.array([rows[similarity[i, rows].argmax()] for i, rows in enumerate(own)])
    fewer = retrieval(images, captions[best], np.arange(30)).image_to_text.recalls
    assert all(fewer[cutoff] >= result.image_to_text.recalls[cutoff] for cutoff in fewer)
    first = retrieval(images, captions[[rows[0] for rows in own]], np.arange(30)).image_to_text.recalls
    assert first != fewer


def test_a_query_without_a_match_has_the_last_rank():
    images, captions, owner = random_pairs(3, 8)
    assert ranks(images, captions, np.array([0, 1, 7]), owner).tolist()[2] == 8


def test_folds_are_consecutive_and_averaged():
    images, captions, owner = random_pairs(30, 80)
    result = retrieval(images, captions, owner, folds=3)
    parts = []
    for fold in range(3):
        rows = owner // 10 == fold
        parts.append(retrieval(images[10 * fold : 10 * fold + 10], captions[rows], owner[rows] - 10 * fold))
    assert isinstance(result, Retrieval) and (result.folds, result.num_images, result.num_captions) == (3, 10, 80)
    for name, field in itertools.product(("image_to_text", "text_to_image"), ("recalls", "chance")):
        of_parts = [getattr(getattr(part, name), field) for part in parts]
        expected = {cutoff: np.mean([part[cutoff] for part in of_parts]) for cutoff in (1, 5, 10)}
        assert getattr(getattr(result, name), field) == pytest.approx(expected)
    assert result.rsum == pytest.approx(np.mean([part.rsum for part in parts]))
    assert result.rsum > retrieval(images, captions, owner).rsum  # fewer items are easier
    assert len({part.rsum for part in parts}) > 1


@pytest.mark.parametrize("cutoff", [1, 2, 5, 9])
def test_chance_equals_the_share_of_all_orders(cutoff):
    """Of all choices of the first items, with 1, 3 and 3 matching ones for three queries."""
    choices = list(itertools.combinations(range(7), min(cutoff, 7)))
    hits = [np.mean([any(item < matching for item in choice) for choice in choices]) for matching in (1, 3, 3)]
    assert chance_recall(np.array([1, 3, 3]), 7, cutoff) == pytest.approx(np.mean(hits))


def test_chance_is_that_of_random_embeddings():
    rng = np.random.default_rng(0)
    images, captions = rng.normal(size=(200, 1, 8)), rng.normal(size=(1000, 1, 8))
    result = retrieval(images, captions, rng.permutation(np.arange(1000) % 200))
    assert result.text_to_image.chance == pytest.approx({1: 1 / 200, 5: 5 / 200, 10: 10 / 200})
    assert result.image_to_text.chance[10] == pytest.approx(1 - (1 - 10 / 1000) ** 5, rel=0.02)
    for direction, n in ((result.image_to_text, 200), (result.text_to_image, 1000)):
        p = direction.chance[10]
        assert direction.recalls[10] == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))


def test_captions_that_two_images_have_are_counted():
    texts = ["a cat", "a dog", "a cat", "a dog", "a dog", "one bird", "one bird"]
    assert shared_captions(texts, np.array([0, 0, 1, 1, 2, 3, 3])) == 5
    with pytest.raises(InputError, match="7 captions and 1 owners"):
        shared_captions(texts, np.array([0]))


def test_ranking_coco_takes_less_than_a_gigabyte():
    """5,000 images and 25,000 captions with 2 x 1,024 numbers each, arguments included."""
    images, captions = (jax.ShapeDtypeStruct((n, 2, 1024), jnp.float32) for n in (5_000, 25_000))
    numbers, owner = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (5_000, 25_000))
    for arguments in ((images, captions, numbers, owner), (captions, images, owner, numbers)):
        memory = ranks.lower(*arguments).compile().memory_analysis()
        assert memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes < 1e9


def with_nan(x, row):
    return np.where(np.arange(len(x))[:, None, None] == row, np.nan, x)


BAD = {
    "one embedding without an axis": (lambda i, c, o: (i[:, 0], c, o), r"images holds float32 of shape \[6, 16\]"),
    "no image": (lambda i, c, o: (i[:0], c, o), r"images holds float32 of shape \[0, 2, 16\]"),
    "whole numbers": (lambda i, c, o: (i, c.astype(int), o), "captions holds int64"),
    "another size": (lambda i, c, o: (i, c[..., :8], o), "images have embeddings of 16 numbers and captions of 8"),
    "too few owners": (lambda i, c, o: (i, c, o[:-1]), r"owner holds int64 of shape \[13\].*each of 14 captions"),
    "owners that are no indices": (lambda i, c, o: (i, c, o.astype(float)), "owner holds float64"),
    "a missing image": (lambda i, c, o: (i, c, np.where(o == 2, 6, o)), r"is 6 \(\d+ of 14 captions.*expected 0 to 5"),
    "a negative owner": (lambda i, c, o: (i, c, np.where(o == 2, -1, o)), r"is -1 \(\d+ of 14 captions"),
    "images without captions": (
        lambda i, c, o: (i, c, np.where(np.isin(o, [2, 4]), 0, o)),
        r"image 2 has no caption \(2 of 6 images have none\)",
    ),
    "NaN in an image": (
        lambda i, c, o: (with_nan(i, 4), c, o),
        r"images\[4\] has an embedding that is not finite \(1 of",
    ),
    "NaN in a caption": (lambda i, c, o: (i, with_nan(c, 3), o), r"captions\[3\] has an embedding that is not finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case):
    damage, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        retrieval(*damage(*random_pairs(6, 14)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folds", [0, 4])
def test_folds_that_do_not_divide_are_refused(folds):
    with pytest.raises(InputError, match=f"folds = {folds} does not divide 6 images"):
        retrieval(*random_pairs(6, 14), folds=folds)
