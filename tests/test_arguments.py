"""What the public functions of analysis say about wrong arguments: an error that names the argument, or NaN under tracing."""

import functools
import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_transfer import analysis
from jax_transfer.analysis import score_all
from jax_transfer.records import Features, InputError

N, D, C = 40, 3, 3
RNG = np.random.default_rng(0)
Y = RNG.permutation(np.arange(N) % C).astype(np.int32)
X = (RNG.normal(size=(C, D))[Y] + RNG.normal(size=(N, D))).astype(np.float32)
P = np.asarray(jax.nn.softmax(2 * RNG.normal(size=(C, 4))[Y] + RNG.normal(size=(N, 4))), np.float32)
Z = P.argmax(axis=1)
HELD_OUT = np.arange(0, N, 4)

# name -> (function of features or what stands for them, labels and number of classes; those features)
LABELLED = {
    "logme": (analysis.logme, X),
    "h_score": (analysis.h_score, X),
    "h_score_shrunk": (analysis.h_score_shrunk, X),
    "transrate": (analysis.transrate, X),
    "nleep": (functools.partial(analysis.nleep, components_per_class=1), X),
    "linear_accuracy": (analysis.linear_accuracy, X),
    "mutual_information": (functools.partial(analysis.mutual_information, steps=32), X),
    "leep": (analysis.leep, P),
    "nce": (lambda z, y, num_classes: analysis.nce(z, y, 4, num_classes), Z),
}
OF_FEATURES = [name for name in LABELLED if name not in ("leep", "nce")]
UNLABELLED = {
    "spectral_components": analysis.spectral_components,
    "batched_spectral_components": analysis.batched_spectral_components,
    "singular_values": analysis.singular_values,
    "pca": analysis.pca,
    "tsne": functools.partial(analysis.tsne, perplexity=5),
}
each = pytest.mark.parametrize("name", LABELLED)

# kind -> (labels, what the message says beside the argument's name)
WRONG_LABELS = {
    "1..C": (Y + 1, "the label 3.*expected 0 to 2.*subtract 1"),
    "-1 for unlabelled": (np.where(Y == 2, -1, Y), "the label -1.*leave out"),
    "gaps": (10 * Y, r"the label 20.*np\.unique"),
    "one wrong among many": (np.where(np.arange(N) == 17, 7, Y), r"the label 7 \(1 of 40"),
    "more classes": (np.arange(N) % 5, "larger num_classes"),
    "beyond 32 bits": (Y.astype(np.int64) + 2**32 * (np.arange(N) == 3), "the label 4294967"),
    "unsigned": (Y.astype(np.uint8) + np.uint8(253), "the label 255"),
    "column": (Y[:, None], r"\[40, 1\].*y\[:, 0\]"),
    "row": (Y[None], r"\[1, 40\]"),
    "one-hot": (np.eye(C)[Y], r"\[40, 3\].*argmax"),
    "scalar": (1, r"shape \[\]"),
    "too few": (Y[:-10], "30 labels: expected 40"),
    "too many": (np.concatenate([Y, Y]), "80 labels: expected 40"),
    "none": (np.array([], int), "0 labels"),
    "whole floats": (Y.astype(np.float32), r"float32.*astype\(int\)"),
    "halves": (Y + 0.5, r"\d\.5 among them"),
    "NaN": (np.where(Y == 1, np.nan, Y), "nan among them"),
    "bool": (Y > 0, r"bool.*astype\(int\)"),
    "text": (np.array(["cat", "dog", "owl"])[Y], r"text.*np\.unique"),
    "objects": ([None, *Y[1:]], "objects"),
    "ragged": ([[0, 1], *Y[1:].tolist()], "no array"),
}


@each
@pytest.mark.parametrize("kind", WRONG_LABELS)
def test_wrong_labels_are_named(name, kind):
    (score, x), (y, message) = LABELLED[name], WRONG_LABELS[kind]
    with pytest.raises(InputError, match=rf"^y .*{message}") as error:
        score(x, y, C)
    assert "\n" not in str(error.value) and str(error.value).endswith(("?.", "."))


@each
@pytest.mark.parametrize("kind", ("0", "1", "negative", "float", "bool", "None", "text", "array"))
def test_a_wrong_number_of_classes_is_named(name, kind):
    wrong = {"0": 0, "1": 1, "negative": -3, "float": 3.0, "bool": True, "None": None, "text": "3", "array": Y}[kind]
    with pytest.raises(InputError, match=r"^num_classes is .*expected a whole number, 2 or more"):
        LABELLED[name][0](LABELLED[name][1], Y, wrong)


@each
def test_a_traced_number_of_classes_is_named(name):
    with pytest.raises(InputError, match=r"^num_classes is traced.*static_argnames"):
        jax.jit(LABELLED[name][0])(LABELLED[name][1], Y, C)


WRONG_FEATURES = {
    "one axis": (X[:, 0], r"shape \[40\]"),
    "three axes": (X[:, :, None], r"\[40, 3, 1\].*reshape"),
    "no columns": (X[:, :0], r"\[40, 0\]"),
    "no rows": (X[:0], r"\[0, 3\]"),
    "complex": (X + 1j, "complex"),
    "text": (X.astype(str), "text"),
    "objects": (X.astype(object), "objects"),
    "ragged": ([[1.0], *X[1:].tolist()], "no array"),
}


@pytest.mark.parametrize("name", (*OF_FEATURES, *UNLABELLED))
@pytest.mark.parametrize("kind", WRONG_FEATURES)
def test_wrong_features_are_named(name, kind):
    x, message = WRONG_FEATURES[kind]
    with pytest.raises(InputError, match=rf"^x .*{message}"):
        UNLABELLED[name](x) if name in UNLABELLED else LABELLED[name][0](x, Y, C)


def as_values(result):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(result)]


HALVES = np.round(8 * X) / 8  # exact in every type
TYPES = {
    "float16": HALVES.astype(np.float16),
    "bfloat16": HALVES.astype(ml_dtypes.bfloat16),
    "jax bfloat16": jnp.asarray(HALVES, jnp.bfloat16),
    "float64": HALVES.astype(np.float64),
    "lists": HALVES.tolist(),
}


@pytest.mark.parametrize("name", (*OF_FEATURES, *UNLABELLED))
def test_other_types_of_features_become_float32(name):
    types = {"bfloat16": TYPES["bfloat16"]} if name == "tsne" else TYPES  # it takes a second each time

    def value(x, y):
        return as_values(UNLABELLED[name](x) if name in UNLABELLED else LABELLED[name][0](x, y, C))

    expected = value(HALVES.astype(np.float32), Y)
    for x in types.values():
        for found, wanted in zip(value(x, Y.tolist()), expected, strict=True):
            assert found.dtype == wanted.dtype and found.dtype in (np.float32, np.int32)
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", ("logme", "h_score", "leep"))
def test_whole_numbers_are_features_too(name):
    score, whole = LABELLED[name][0], np.eye(C, dtype=np.int64)[Y]
    assert score(whole, Y, C) == score(whole.astype(np.float32), Y, C) == score(whole.astype(bool), Y, C)


@each
@pytest.mark.parametrize("dtype", (np.uint8, np.int16, np.int64, np.uint64))
def test_every_type_of_whole_labels_gives_the_same_value(name, dtype):
    score, x = LABELLED[name]
    assert score(x, Y.astype(dtype), np.int64(C)) == score(x, Y, C)


@each
def test_traced_labels_out_of_range_give_nan(name):
    score, x = LABELLED[name]
    jitted = jax.jit(score, static_argnums=2)
    np.testing.assert_allclose(jitted(x, Y, C), score(x, Y, C), rtol=1e-5)
    for kind in ("1..C", "-1 for unlabelled", "gaps", "one wrong among many"):
        assert np.isnan(jitted(x, WRONG_LABELS[kind][0].astype(np.int32), C)), kind
    for kind in ("column", "one-hot", "too few", "whole floats", "bool"):
        with pytest.raises(InputError, match=r"^y "):
            jitted(x, WRONG_LABELS[kind][0], C)


@each
def test_under_vmap_only_the_wrong_checkpoint_is_nan(name):
    score, x = LABELLED[name]
    y = np.stack([Y, Y + 1, Y])
    found = jax.vmap(lambda x, y: score(x, y, C))(np.stack([x] * 3), y)
    assert np.isnan(found).tolist() == [False, True, False]
    shared = jax.vmap(lambda x: score(x, Y, C))(np.stack([x] * 2))  # labels that are not traced are checked as such
    np.testing.assert_allclose(shared, found[::2], rtol=1e-5)
    with pytest.raises(InputError, match=r"^y "):
        jax.vmap(lambda x: score(x, Y + 1, C))(np.stack([x] * 2))


@pytest.mark.parametrize("name", [name for name in LABELLED if name != "nce"])
def test_features_that_are_not_finite_are_nan_and_no_error(name):
    score, x = LABELLED[name]
    for bad in (np.nan, np.inf):
        broken = x.copy()
        broken[3, 1] = bad
        assert np.isnan(score(broken, Y, C))


LOGITS = {
    "logits": np.log(P) + 1,
    "one row of logits": np.where(np.arange(N)[:, None] == 5, 4 * P, P),
    "negative": np.concatenate([P - 0.25, np.ones((N, 1))], axis=1) * [1, 1, 1, 1, 1],
    "log-probabilities": np.log(P),
    "zeros": 0 * P,
    "percent": 100 * P,
}


@pytest.mark.parametrize("kind", LOGITS)
def test_leep_takes_probabilities_alone(kind):
    p = np.asarray(LOGITS[kind], np.float32)
    with pytest.raises(InputError, match=r"^source_probs holds .* no probabilities .*softmax\(logits\)"):
        analysis.leep(p, Y, C)
    assert np.isnan(jax.jit(analysis.leep, static_argnums=2)(p, Y, C))


@pytest.mark.parametrize("dtype", (np.float16, ml_dtypes.bfloat16, np.float64))
def test_rounded_probabilities_are_probabilities(dtype):
    many = np.asarray(jax.nn.softmax(3 * RNG.normal(size=(N, 1000))), np.float32).astype(dtype)
    np.testing.assert_allclose(analysis.leep(many, Y, C), analysis.leep(many.astype(np.float32), Y, C), rtol=1e-6)


def test_source_labels_are_checked_as_labels_are():
    for z, message in ((Z + 1, "the label"), (Z[:, None], "shape"), (Z[:0], "0 labels"), (Z + 0.0, "float")):
        with pytest.raises(InputError, match=rf"^source_labels .*{message}"):
            analysis.nce(z, Y, int(Z.max()) + 1, C)
    with pytest.raises(InputError, match=r"^num_source_classes is 4.0"):
        analysis.nce(Z, Y, 4.0, C)
    assert np.isnan(jax.jit(analysis.nce, static_argnums=(2, 3))(Z + 1, Y, int(Z.max()) + 1, C))


WRONG_HELD_OUT = {
    "out of range": ([0, 3, 5, N], "the index 40"),
    "negative": ([0, 3, 5, -1], "the index -1"),
    "twice": ([3, 5, 7, 3], "more than once"),
    "mask": (np.arange(N) < 8, r"flatnonzero"),
    "floats": (HELD_OUT + 0.0, "float64"),
    "column": (HELD_OUT[:, None], r"\[10, 1\]"),
    "none": (np.array([], int), "0 of 40"),
    "all": (np.arange(N), "40 of 40"),
}


@pytest.mark.parametrize("kind", WRONG_HELD_OUT)
def test_wrong_held_out_indices_are_named(kind):
    held_out, message = WRONG_HELD_OUT[kind]
    with pytest.raises(InputError, match=rf"^held_out .*{message}"):
        analysis.linear_accuracy(X, Y, C, held_out=held_out)


def test_traced_held_out_indices_that_are_wrong_give_nan():
    jitted = jax.jit(lambda held_out: analysis.linear_accuracy(X, Y, C, held_out=held_out))
    np.testing.assert_allclose(jitted(HELD_OUT), analysis.linear_accuracy(X, Y, C, held_out=HELD_OUT), rtol=1e-5)
    for wrong in (HELD_OUT + 4, HELD_OUT - 1, HELD_OUT * 0):
        assert np.isnan(jitted(wrong))


def test_score_all_names_the_argument():
    stacked = Features(np.stack([X, X]), np.stack([P, P]), np.stack([Y, Y]))
    np.testing.assert_allclose(score_all("logme", stacked, C), [analysis.logme(X, Y, C)] * 2, rtol=1e-5)
    for name in ("logme", "nleep", "leep"):
        for change, message in (
            ({"labels": np.stack([Y, Y + 1])}, "^labels .*subtract 1"),
            ({"labels": np.stack([Y, Y])[:, :30]}, "^labels holds 30"),
            ({"labels": np.stack([Y, Y]) + 0.0}, "^labels holds float64"),
            ({"labels": Y}, "do not match"),
            ({"features": X}, r"^features .*\[k, n, d\]"),
            ({"logits": P[None]}, "do not match"),
        ):
            with pytest.raises(InputError, match=message):
                score_all(name, Features(**{**vars(stacked), **change}), C)
        with pytest.raises(InputError, match=r"^num_classes"):
            score_all(name, stacked, 3.0)
    with pytest.raises(InputError, match=r"^held_out"):
        score_all("linear_1", stacked, C, [0, 99])
    with pytest.raises(InputError, match=r"Unknown score.*logme"):
        score_all("logmee", stacked, C)


@pytest.mark.parametrize("name", ("linear_1", "mi_alpha_0.5", "nleep"))
def test_too_few_samples_are_nan_in_score_all_and_said(name):
    one = Features(X[:1], P[:1], Y[:1])
    assert np.isnan(score_all(name, jax.tree.map(lambda leaf: leaf[None], one), C)).all()
    assert "x has 1 sample" in analysis.why_undefined(name, one, C)


def test_singular_values_and_stacked_features_are_checked():
    for function in (analysis.effective_rank, analysis.spectral_decay, analysis.main_rank):
        assert function([3.0, 1.0, 0.5]) == function(jnp.array([3.0, 1.0, 0.5]))
        with pytest.raises(InputError, match=r"^singular_values has the shape \[40, 3\]: expected \[s\]"):
            function(X)
    np.testing.assert_allclose(analysis.similarities([X.tolist()]).cka, 1, rtol=1e-5)
    with pytest.raises(InputError, match=r"^x has the shape \[40, 3\]: expected \[k, n, d\]"):
        analysis.similarities(X)
    with pytest.raises(InputError, match=r"^y has 30 samples and x 40"):
        analysis.similarities(X[None], X[None, :30])


WRONG_SETTINGS = {
    "energy": [(analysis.spectral_components, {"energy": 0}), (analysis.spectral_components, {"energy": 1.5}),
               (analysis.pca, {"energy": 1.0}), (analysis.nleep, {"energy": 80}), (analysis.similarities, {"energy": 2})],
    "batch_size": [(analysis.batched_spectral_components, {"batch_size": 0}), (analysis.linear_accuracy, {"batch_size": 1.5})],
    "epochs": [(analysis.linear_accuracy, {"epochs": 0}), (analysis.linear_accuracy, {"epochs": 2.0})],
    "eps": [(analysis.transrate, {"eps": 0.0}), (analysis.transrate, {"eps": np.nan})],
    "perplexity": [(analysis.tsne, {"perplexity": 0})],
    "components_per_class": [(analysis.nleep, {"components_per_class": 0})],
    "max_dimension": [(analysis.nleep, {"max_dimension": 0})],
}  # fmt: skip


@pytest.mark.parametrize(("name", "function", "given"), [(k, *one) for k, v in WRONG_SETTINGS.items() for one in v])
def test_wrong_settings_are_named(name, function, given):
    labelled = "num_classes" in inspect.signature(function).parameters
    args = (X, Y, C) if labelled else (X[None],) if function is analysis.similarities else (X,)
    with pytest.raises(InputError, match=rf"^{name} is "):
        function(*args, **given)


@pytest.mark.parametrize("name", [name for name in analysis.__all__ if name.islower()])
def test_public_functions_keep_their_signature_and_docstring(name):
    function = getattr(analysis, name)
    assert inspect.getdoc(function) and "args" not in inspect.signature(function).parameters


def test_what_the_modules_offer_is_exported():
    for module in (
        "spectral",
        "embedding",
        "hscore",
        "leep",
        "linear",
        "logme",
        "nleep",
        "mutual_information",
        "transrate",
    ):
        for function in LABELLED | UNLABELLED:
            found = getattr(getattr(analysis, module, None), function, None)
            assert found is None or found is getattr(analysis, function)
    names = analysis.__all__
    kinds = [
        [n for n in names if n.isupper()],
        [n for n in names if not n.isupper() and n[0].isupper()],
        [n for n in names if n.islower()],
    ]
    assert names == [name for kind in kinds for name in sorted(kind)]
    assert {"spectral_components", "SpectralComponents", "effective_rank", "similarities", "pca", "tsne"} <= set(names)
