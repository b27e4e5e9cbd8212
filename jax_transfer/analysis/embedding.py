"""Two-dimensional embeddings of features for visualisation."""

import numpy as np
from jaxtyping import Array, Float

from jax_transfer.analysis.arguments import as_features, as_number
from jax_transfer.records import InputError

MOST_POINTS = 5000


def tsne(x: Float[Array | np.ndarray, "n d"], seed: int = 0, perplexity: float = 30.0) -> Float[np.ndarray, "n 2"]:
    """Embeds features in the plane with scikit-learn's t-SNE, starting from the first two principal components.

    Distances within a cluster are more meaningful than distances between clusters; the sizes of clusters mean nothing.
    Van der Maaten and Hinton, "Visualizing Data using t-SNE", JMLR 2008.

    Args:
      x: features of 4 to 5,000 samples; 2,000 samples take about 10 s on a CPU.
      seed: seed of the optimisation, a whole number of at most 32 bits.
      perplexity: roughly the number of neighbours considered for each sample; at most (n - 1) / 3 is used.

    Returns:
      Coordinates [n, 2], float32, in arbitrary units.

    Raises:
      InputError: if there are fewer than 4 or more than 5,000 samples, if the features have the wrong type or shape or
        are not finite, or if seed or perplexity is out of range.

    Example:
      >>> import numpy as np
      >>> tsne(np.eye(6), perplexity=2.0).shape
      (6, 2)
    """
    import sklearn.manifold  # imported here because the import takes a second

    x = np.asarray(as_features(x), np.float32)
    n = len(x)
    if not 4 <= n <= MOST_POINTS:
        raise InputError(f"x has {n} samples: expected 4 to {MOST_POINTS:,} for t-SNE. Pass a random subset.")
    if not np.isfinite(x).all():
        raise InputError("x holds NaN or infinite values: expected finite features.")
    as_number(perplexity, "perplexity", lambda perplexity: perplexity > 0, "a positive number, such as 30")
    is_seed = lambda seed: float(seed).is_integer() and 0 <= seed < 2**32  # noqa: E731
    as_number(seed, "seed", is_seed, "a whole number of at least 0 and less than 2**32")
    x = x - x.mean(0)
    x = x / (np.abs(x).max() or 1)
    method = sklearn.manifold.TSNE(perplexity=min(perplexity, (n - 1) / 3), init="pca", random_state=int(seed))
    return method.fit_transform(x)
