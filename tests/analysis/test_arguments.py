"""Invalid arguments of the public functions of analysis: an error names the argument; under tracing they give NaN."""

import dataclasses
import functools
import importlib
import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_transfer import analysis
from jax_transfer.analysis import score_all
from jax_transfer.records import Features, InputError
from jax_transfer.trust.measure import ranking_row

N, D, C = 40, 3, 3
RNG = np.random.default_rng(0)
Y = RNG.permutation(np.arange(N) % C).astype(np.int32)
X = (RNG.normal(size=(C, D))[Y] + RNG.normal(size=(N, D))).astype(np.float32)
P = np.asarray(jax.nn.softmax(2 * RNG.normal(size=(C, 4))[Y] + RNG.normal(size=(N, 4))), np.float32)
Z = P.argmax(axis=1)
HELD_OUT = np.arange(0, N, 4)

# name -> (function of x, labels and number of classes; x, which is features, probabilities or source labels)
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
each_score = pytest.mark.parametrize("name", LABELLED)

# kind -> (labels, pattern of the message after the argument's name)
INVALID_LABELS = {
    "1..C": (Y + 1, "the label 3.*expected 0 to 2.*Subtract 1"),
    "-1 for unlabelled": (np.where(Y == 2, -1, Y), "the label -1.*Remove"),
    "gaps": (10 * Y, r"the label 20.*np\.unique"),
    "one invalid label": (np.where(np.arange(N) == 17, 7, Y), r"the label 7 \(1 of 40"),
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
    "integral floats": (Y.astype(np.float32), r"float32.*astype\(int\)"),
    "halves": (Y + 0.5, r"\d\.5 among them"),
    "NaN": (np.where(Y == 1, np.nan, Y), "nan among them"),
    "bool": (Y > 0, r"bool.*astype\(int\)"),
    "text": (np.array(["cat", "dog", "owl"])[Y], r"text.*np\.unique"),
    "objects": ([None, *Y[1:]], "objects"),
    "ragged": ([[0, 1], *Y[1:].tolist()], "not an array"),
}


@each_score
@pytest.mark.parametrize("kind", INVALID_LABELS)
def test_error_names_invalid_labels(name, kind):
    (score, x), (y, message) = LABELLED[name], INVALID_LABELS[kind]
    with pytest.raises(InputError, match=rf"^y .*{message}") as error:
        score(x, y, C)
    assert "\n" not in str(error.value) and str(error.value).endswith(("?.", "."))


@each_score
@pytest.mark.parametrize("kind", ("0", "1", "negative", "float", "bool", "None", "text", "array"))
def test_error_names_invalid_num_classes(name, kind):
    invalid = {"0": 0, "1": 1, "negative": -3, "float": 3.0, "bool": True, "None": None, "text": "3", "array": Y}[kind]
    with pytest.raises(InputError, match=r"^num_classes is .*expected a whole number of at least 2"):
        LABELLED[name][0](LABELLED[name][1], Y, invalid)


@each_score
def test_error_names_traced_num_classes(name):
    with pytest.raises(InputError, match=r"^num_classes is traced.*static_argnames"):
        jax.jit(LABELLED[name][0])(LABELLED[name][1], Y, C)


INVALID_FEATURES = {
    "one axis": (X[:, 0], r"shape \[40\]"),
    "three axes": (X[:, :, None], r"\[40, 3, 1\].*Reshape"),
    "no columns": (X[:, :0], r"\[40, 0\]"),
    "no rows": (X[:0], r"\[0, 3\]"),
    "complex": (X + 1j, "complex"),
    "text": (X.astype(str), "text"),
    "objects": (X.astype(object), "objects"),
    "ragged": ([[1.0], *X[1:].tolist()], "not an array"),
}


@pytest.mark.parametrize("name", (*OF_FEATURES, *UNLABELLED))
@pytest.mark.parametrize("kind", INVALID_FEATURES)
def test_error_names_invalid_features(name, kind):
    x, message = INVALID_FEATURES[kind]
    with pytest.raises(InputError, match=rf"^x .*{message}"):
        UNLABELLED[name](x) if name in UNLABELLED else LABELLED[name][0](x, Y, C)


def as_arrays(result):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(result)]


HALVES = np.round(8 * X) / 8  # exact in every dtype
DTYPES = {
    "float16": HALVES.astype(np.float16),
    "bfloat16": HALVES.astype(ml_dtypes.bfloat16),
    "jax bfloat16": jnp.asarray(HALVES, jnp.bfloat16),
    "float64": HALVES.astype(np.float64),
    "lists": HALVES.tolist(),
}


@pytest.mark.parametrize("name", (*OF_FEATURES, *UNLABELLED))
def test_other_dtypes_are_converted_to_float32(name):
    dtypes = {"bfloat16": DTYPES["bfloat16"]} if name == "tsne" else DTYPES  # tsne takes a second each time

    def value(x, y):
        return as_arrays(UNLABELLED[name](x) if name in UNLABELLED else LABELLED[name][0](x, y, C))

    expected = value(HALVES.astype(np.float32), Y)
    for x in dtypes.values():
        for found, reference in zip(value(x, Y.tolist()), expected, strict=True):
            assert found.dtype == reference.dtype and found.dtype in (np.float32, np.int32)
            np.testing.assert_array_equal(found, reference)


@pytest.mark.parametrize("name", ("logme", "h_score", "leep"))
def test_integer_and_bool_features_equal_float32(name):
    score, x = LABELLED[name][0], np.eye(C, dtype=np.int64)[Y]
    assert score(x, Y, C) == score(x.astype(np.float32), Y, C) == score(x.astype(bool), Y, C)


@each_score
@pytest.mark.parametrize("dtype", (np.uint8, np.int16, np.int64, np.uint64))
def test_integer_dtype_of_labels_does_not_matter(name, dtype):
    score, x = LABELLED[name]
    assert score(x, Y.astype(dtype), np.int64(C)) == score(x, Y, C)


@each_score
def test_traced_labels_out_of_range_give_nan(name):
    score, x = LABELLED[name]
    jitted = jax.jit(score, static_argnums=2)
    np.testing.assert_allclose(jitted(x, Y, C), score(x, Y, C), rtol=1e-5)
    for kind in ("1..C", "-1 for unlabelled", "gaps", "one invalid label"):
        assert np.isnan(jitted(x, INVALID_LABELS[kind][0].astype(np.int32), C)), kind
    for kind in ("column", "one-hot", "too few", "integral floats", "bool"):
        with pytest.raises(InputError, match=r"^y "):
            jitted(x, INVALID_LABELS[kind][0], C)


@each_score
def test_vmap_gives_nan_only_for_the_invalid_checkpoint(name):
    score, x = LABELLED[name]
    y = np.stack([Y, Y + 1, Y])
    found = jax.vmap(lambda x, y: score(x, y, C))(np.stack([x] * 3), y)
    assert np.isnan(found).tolist() == [False, True, False]
    shared = jax.vmap(lambda x: score(x, Y, C))(np.stack([x] * 2))  # untraced labels are checked eagerly
    np.testing.assert_allclose(shared, found[::2], rtol=1e-5)
    with pytest.raises(InputError, match=r"^y "):
        jax.vmap(lambda x: score(x, Y + 1, C))(np.stack([x] * 2))


@pytest.mark.parametrize("name", [name for name in LABELLED if name != "nce"])
def test_non_finite_features_give_nan(name):
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
def test_leep_rejects_anything_but_probabilities(kind):
    p = np.asarray(LOGITS[kind], np.float32)
    with pytest.raises(InputError, match=r"^source_probs holds .* not probabilities .*softmax\(logits\)"):
        analysis.leep(p, Y, C)
    assert np.isnan(jax.jit(analysis.leep, static_argnums=2)(p, Y, C))


@pytest.mark.parametrize("dtype", (np.float16, ml_dtypes.bfloat16, np.float64))
def test_leep_accepts_probabilities_rounded_to_other_dtypes(dtype):
    many = np.asarray(jax.nn.softmax(3 * RNG.normal(size=(N, 1000))), np.float32).astype(dtype)
    np.testing.assert_allclose(analysis.leep(many, Y, C), analysis.leep(many.astype(np.float32), Y, C), rtol=1e-6)


def test_nce_checks_source_labels_like_labels():
    for z, message in ((Z + 1, "the label"), (Z[:, None], "shape"), (Z[:0], "0 labels"), (Z + 0.0, "float")):
        with pytest.raises(InputError, match=rf"^source_labels .*{message}"):
            analysis.nce(z, Y, int(Z.max()) + 1, C)
    with pytest.raises(InputError, match=r"^num_source_classes is 4.0"):
        analysis.nce(Z, Y, 4.0, C)
    assert np.isnan(jax.jit(analysis.nce, static_argnums=(2, 3))(Z + 1, Y, int(Z.max()) + 1, C))


INVALID_HELD_OUT = {
    "out of range": ([0, 3, 5, N], "the index 40"),
    "negative": ([0, 3, 5, -1], "the index -1"),
    "twice": ([3, 5, 7, 3], "more than once"),
    "mask": (np.arange(N) < 8, r"flatnonzero"),
    "floats": (HELD_OUT + 0.0, "float64"),
    "column": (HELD_OUT[:, None], r"\[10, 1\]"),
    "none": (np.array([], int), "0 of 40"),
    "all": (np.arange(N), "40 of 40"),
}


@pytest.mark.parametrize("kind", INVALID_HELD_OUT)
def test_error_names_invalid_held_out_indices(kind):
    held_out, message = INVALID_HELD_OUT[kind]
    with pytest.raises(InputError, match=rf"^held_out .*{message}"):
        analysis.linear_accuracy(X, Y, C, held_out=held_out)


def test_invalid_traced_held_out_indices_give_nan():
    jitted = jax.jit(lambda held_out: analysis.linear_accuracy(X, Y, C, held_out=held_out))
    np.testing.assert_allclose(jitted(HELD_OUT), analysis.linear_accuracy(X, Y, C, held_out=HELD_OUT), rtol=1e-5)
    for invalid in (HELD_OUT + 4, HELD_OUT - 1, HELD_OUT * 0):
        assert np.isnan(jitted(invalid))


def test_score_all_names_the_invalid_argument():
    stacked = Features(np.stack([X, X]), np.stack([P, P]), np.stack([Y, Y]))
    np.testing.assert_allclose(score_all("logme", stacked, C), [analysis.logme(X, Y, C)] * 2, rtol=1e-5)
    for name in ("logme", "nleep", "leep"):
        for change, message in (
            ({"labels": np.stack([Y, Y + 1])}, "^labels .*Subtract 1"),
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
def test_score_all_gives_nan_and_reason_for_too_few_samples(name):
    one = Features(X[:1], P[:1], Y[:1])
    assert np.isnan(score_all(name, jax.tree.map(lambda leaf: leaf[None], one), C)).all()
    assert "x has 1 sample" in analysis.why_undefined(name, one, C)


def test_shapes_of_singular_values_and_stacked_features_are_checked():
    for function in (analysis.effective_rank, analysis.spectral_decay, analysis.main_rank):
        assert function([3.0, 1.0, 0.5]) == function(jnp.array([3.0, 1.0, 0.5]))
        with pytest.raises(InputError, match=r"^singular_values has the shape \[40, 3\]: expected \[s\]"):
            function(X)
    np.testing.assert_allclose(analysis.similarities([X.tolist()]).cka, 1, rtol=1e-5)
    with pytest.raises(InputError, match=r"^x has the shape \[40, 3\]: expected \[k, n, d\]"):
        analysis.similarities(X)
    with pytest.raises(InputError, match=r"^y has 30 samples and x 40"):
        analysis.similarities(X[None], X[None, :30])


# kind of setting -> invalid values
SETTINGS = {
    "share": (0, 1.5, -0.1, np.nan, np.inf, "0.8", [0.8], None, True, 1j),
    "positive": (0, -1, np.nan, "1", [0.1], np.ones(2), None, True),
    "count": (0, -1, 1.5, np.nan, "1", [1], True),
    "seed": (1.5, np.nan, "0", [0], None, True, 2**40),
}
INVALID_SETTINGS = {
    analysis.spectral_components: {"energy": "share"},
    analysis.batched_spectral_components: {"energy": "share", "batch_size": "count"},
    analysis.similarities: {"energy": "share"},
    analysis.pca: {"energy": "share"},
    analysis.nleep: {"energy": "share", "components_per_class": "count", "max_dimension": "count", "seed": "seed"},
    analysis.mutual_information: {"alpha": "share", "batch_size": "count", "steps": "count", "seed": "seed"},
    analysis.linear_accuracy: {
        "epochs": "count",
        "batch_size": "count",
        "learning_rate": "positive",
        "l2": "positive",
        "seed": "seed",
    },
    analysis.transrate: {"eps": "positive"},
    analysis.tsne: {"perplexity": "positive", "seed": "seed"},
    analysis.recall_at_k: {"k": "count"},
    analysis.relative_accuracy_at_k: {"k": "count"},
    analysis.kendall_interval: {"confidence": "share", "resamples": "count"},
}
# Settings that may be None.
OPTIONAL = ("epochs", "max_dimension")


@pytest.mark.parametrize(("function", "name"), [(f, name) for f, names in INVALID_SETTINGS.items() for name in names])
def test_error_names_invalid_settings(function, name):
    parameters = inspect.signature(function).parameters
    args = (X[None],) if function is analysis.similarities else (X,)
    if "num_classes" in parameters:
        args = (X, Y, C)
    elif "accuracies" in parameters:
        args = ([1, 2, 3], [1, 3, 2])
    for value in SETTINGS[INVALID_SETTINGS[function][name]]:
        with pytest.raises(InputError, match=rf"^{name} is ") as error:
            function(*args, **{name: value})
        assert "\n" not in str(error.value) and "expected" in str(error.value)
    if name not in OPTIONAL:
        with pytest.raises(InputError, match=rf"^{name} is None: expected "):
            function(*args, **{name: None})


# Labels that are valid where any integers are.
INTEGERS = ("1..C", "gaps", "more classes", "one invalid label", "unsigned", "too few", "too many", "beyond 32 bits")


@pytest.mark.parametrize("kind", [kind for kind in INVALID_LABELS if kind not in INTEGERS])
def test_stratified_fifth_rejects_invalid_labels(kind):
    y, message = INVALID_LABELS[kind]
    with pytest.raises(InputError, match=rf"^y .*{message.removesuffix('.*argmax')}"):
        analysis.stratified_fifth(y)


def test_stratified_fifth_accepts_arbitrary_integer_labels():
    expected = analysis.stratified_fifth(Y)
    for y in (Y.tolist(), 10 * Y + 7, Y.astype(np.uint8) + np.uint8(253), jnp.asarray(Y), Y.astype(np.int64)):
        np.testing.assert_array_equal(analysis.stratified_fifth(y), expected)
    with pytest.raises(InputError, match=r"^y holds the label 4294967"):
        analysis.stratified_fifth(INVALID_LABELS["beyond 32 bits"][0])


@pytest.mark.parametrize("name", ("logme", "nleep", "linear_1", "leep"))
@pytest.mark.parametrize("kind", INVALID_LABELS)
def test_score_gigaflops_rejects_invalid_labels(name, kind):
    y, message = INVALID_LABELS[kind]
    if kind == "column":
        message = message.replace("y", "labels", 1)
    with pytest.raises(InputError, match=rf"^labels .*{message}"):
        analysis.score_gigaflops(name, Features(X, P, y), C)


def test_score_gigaflops_accepts_lists_and_names_invalid_arguments():
    as_lists = Features(X.tolist(), P.tolist(), Y.tolist())
    for name in ("nleep", "h_score"):
        found = [analysis.score_gigaflops(name, one, C) for one in (as_lists, Features(X, P, Y))]
        assert found[0] == found[1] > 0
    for function in (analysis.score_gigaflops, analysis.why_undefined):
        with pytest.raises(InputError, match=r"Unknown score.*logme"):
            function("logmee", as_lists, C)
    with pytest.raises(InputError, match=r"^num_classes is 3.0"):
        analysis.score_gigaflops("nleep", as_lists, 3.0)
    with pytest.raises(InputError, match=r"^logits holds 20 samples and features 40"):
        analysis.score_gigaflops("logme", Features(X, P[:20], Y), C)


@pytest.mark.parametrize(
    "function",
    (
        analysis.pearson,
        analysis.kendall,
        analysis.weighted_kendall,
        analysis.regret,
        analysis.kendall_interval,
        functools.partial(ranking_row, "t", "m", "s"),
    ),
)
def test_ranking_metrics_accept_only_real_numbers(function):
    for invalid in (["a", "b", "c"], [1j, 2, 3], [[1], [2, 3], [4]], {1: 2}, "abc"):
        with pytest.raises(InputError, match=r"^scores is .*expected a list of real numbers"):
            function(invalid, [1, 2, 3])
        with pytest.raises(InputError, match=r"^accuracies is .*expected a list of real numbers"):
            function([1, 2, 3], invalid)
    arrays = function(jnp.array([1, 2, 3], jnp.bfloat16), (0.1, 0.2, 0.3))
    lists = function([1, 2, 3], [0.1, 0.2, 0.3])
    if dataclasses.is_dataclass(lists):
        arrays, lists = dataclasses.astuple(arrays), dataclasses.astuple(lists)
    np.testing.assert_equal(arrays, lists)  # NaN equals NaN


def test_error_names_unknown_metric():
    with pytest.raises(InputError, match=r"^Unknown metric: 'acuracy'. Did you mean 'accuracy'"):
        ranking_row("t", "probe", "logme", [1, 2], [1, 2], "acuracy")


def test_singular_values_must_be_descending_and_non_negative():
    for function in (analysis.effective_rank, analysis.spectral_decay, analysis.main_rank):
        for invalid in ([1.0, 2.0], [3.0, -1.0], [-1.0]):
            with pytest.raises(InputError, match=r"^singular_values holds negative or ascending values"):
                function(invalid)
    for function in (analysis.effective_rank, analysis.spectral_decay):
        for broken in ([3.0, np.nan], [np.inf, 1.0], [np.nan, np.nan]):
            assert np.isnan(function(broken)) and np.isnan(jax.jit(function)(jnp.array(broken)))


@pytest.mark.parametrize("name", [name for name in analysis.__all__ if name.islower()])
def test_public_functions_have_docstrings_and_named_parameters(name):
    function = getattr(analysis, name)
    assert inspect.getdoc(function) and "args" not in inspect.signature(function).parameters


def test_package_exports_the_functions_of_its_modules():
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
        own = {
            name: function
            for name, function in vars(importlib.import_module(f"jax_transfer.analysis.{module}")).items()
            if name in LABELLED or name in UNLABELLED
        }
        assert own and all(function is getattr(analysis, name) for name, function in own.items())
    names = analysis.__all__
    kinds = [
        [n for n in names if n.isupper()],
        [n for n in names if not n.isupper() and n[0].isupper()],
        [n for n in names if n.islower()],
    ]
    assert names == [name for kind in kinds for name in sorted(kind)]
    assert {"spectral_components", "SpectralComponents", "effective_rank", "similarities", "pca", "tsne"} <= set(names)
