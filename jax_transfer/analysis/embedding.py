"""Two-dimensional embeddings of features, for the eye."""

import numpy as np
from jaxtyping import Float

from jax_transfer.analysis.arguments import as_features, as_number
from jax_transfer.records import InputError

MOST_POINTS = 5000


def tsne(x: Float[np.ndarray, "n d"], seed: int = 0, perplexity: float = 30.0) -> Float[np.ndarray, "n 2"]:
    """t-SNE (van der Maaten and Hinton, JMLR 2008) by scikit-learn, started from the first two principal components.

    Distances within a cluster mean more than those between clusters, and sizes of clusters mean nothing.

    Args:
      x: features of a few thousand samples at most: it takes about 10 s for 2,000 on a CPU.
      seed: of the optimisation.
      perplexity: about how many neighbours count; fewer for fewer than 90 samples.

    Raises:
      InputError: for fewer than 4 or more than 5,000 samples, features of the wrong type or shape or that are not finite, or
        a perplexity that is not positive.
    """
    import sklearn.manifold  # here, because it takes a second

    x = np.asarray(as_features(x), np.float32)
    n = len(x)
    if not 4 <= n <= MOST_POINTS:
        raise InputError(f"x has {n} samples: t-SNE takes 4 to {MOST_POINTS:,}; pass a random part of them.")
    if not np.isfinite(x).all():
        raise InputError("x holds values that are NaN or infinite.")
    as_number(perplexity, "perplexity", lambda perplexity: perplexity > 0, "a positive number, such as 30")
    is_seed = lambda seed: float(seed).is_integer() and 0 <= seed < 2**32  # noqa: E731
    as_number(seed, "seed", is_seed, "a whole number, 0 or more, of at most 32 bits")
    x = x - x.mean(0)
    x = x / (np.abs(x).max() or 1)
    method = sklearn.manifold.TSNE(perplexity=min(perplexity, (n - 1) / 3), init="pca", random_state=int(seed))
    return method.fit_transform(x)
