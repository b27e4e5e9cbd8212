"""Captions from the names of classes, for contrast between images and language on data sets without captions."""

import dataclasses
import re

import numpy as np

from jax_transfer.data.source import Source

TEMPLATES = (
    "a picture of a {}.",
    "a snapshot of a {}.",
    "a photograph showing a {}.",
    "this picture shows a {}.",
    "there is a {} here.",
    "we see a {}.",
    "look at this {}.",
    "here is my {}.",
    "somebody's {}.",
    "a {} and nothing else.",
    "a {} close to the camera.",
    "a {} far from the camera.",
    "a {} in the middle of the picture.",
    "a {} at the edge of the picture.",
    "a {} seen from above.",
    "a {} seen from below.",
    "a {} seen from the side.",
    "a {} seen from behind.",
    "the front of a {}.",
    "part of a {}.",
    "the whole {}.",
    "a {}, partly hidden.",
    "a tiny {}.",
    "a huge {}.",
    "a little {} in a wide view.",
    "an old {}.",
    "a new {}.",
    "a beautiful {}.",
    "an ugly {}.",
    "a strange {}.",
    "an ordinary {}.",
    "a typical {}.",
    "a rare kind of {}.",
    "a dusty {}.",
    "a spotless {}.",
    "a bright picture of a {}.",
    "a dim picture of a {}.",
    "a {} at night.",
    "a {} in the morning light.",
    "a {} against the light.",
    "a {} in the shade.",
    "a {} outdoors.",
    "a {} indoors.",
    "a {} on a plain background.",
    "a {} in front of a busy background.",
    "a {} in winter.",
    "a {} in summer.",
    "a grainy picture of a {}.",
    "an out-of-focus picture of a {}.",
    "a sharp picture of a {}.",
    "a shaky picture of a {}.",
    "a picture of a {} with few pixels.",
    "a picture of a {} full of detail.",
    "a picture of a {} with strong compression.",
    "a colourful picture of a {}.",
    "a {} in grey tones.",
    "a {} in faded colours.",
    "a tilted picture of a {}.",
    "a mirrored picture of a {}.",
    "an enlarged picture of a {}.",
    "a thumbnail of a {}.",
    "a scan of a picture of a {}.",
    "a screenshot with a {}.",
    "a postcard of a {}.",
    "a page of a book about a {}.",
    "an advertisement for a {}.",
    "a holiday memory of a {}.",
    "a {} from an encyclopedia.",
    "a {} from an album.",
    "a {} drawn by hand.",
    "a {} painted in oil.",
    "a pencil study of a {}.",
    "a comic with a {}.",
    "a {} made of paper.",
    "a model of a {}.",
    "a statue of a {}.",
    "a {} as a toy.",
    "a computer graphic of a {}.",
    "several pictures, one of a {}.",
    "{}, as seen by a passer-by.",
)
CAPTIONS_OF_AN_IMAGE = 8  # drawn from the templates for each image
CHUNK = 10_000  # images whose templates are drawn at a time


def spoken(class_name: str) -> str:
    """Returns the name of a class as words: lower case, and spaces for underscores.

    >>> spoken("European_fire_salamander")
    'european fire salamander'
    """
    return re.sub(r"[\s_]+", " ", class_name).strip().lower()


def captions_of(class_name: str, templates: tuple[str, ...] = TEMPLATES) -> tuple[str, ...]:
    """Returns a caption from each template for a class.

    >>> captions_of("tree_frog")[0]
    'a picture of a tree frog.'
    """
    return tuple(template.format(spoken(class_name)) for template in templates)


def with_templates(source: Source, seed: int) -> Source:
    """Returns a source with captions from the names of its classes: CAPTIONS_OF_AN_IMAGE templates for each image.

    Each image has its own templates, drawn without replacement. Images and labels, and so the fingerprint, are the
    same.

    >>> from jax_transfer.data.source import from_arrays
    >>> source = from_arrays(np.zeros((1, 8, 8), np.uint8), [0], class_names=["tree_frog"])
    >>> captions = with_templates(source, seed=0).captions[0]
    >>> len(captions), all("tree frog" in caption for caption in captions)
    (8, True)
    """
    generator, captions = np.random.default_rng(seed), []
    of_class = [captions_of(name) for name in source.class_names]
    for start in range(0, len(source), CHUNK):
        labels = source.labels[start : start + CHUNK]
        chosen = generator.random((len(labels), len(TEMPLATES))).argsort(axis=1)[:, :CAPTIONS_OF_AN_IMAGE]
        captions += [
            tuple(of_class[k][i] for i in row) for k, row in zip(labels.tolist(), chosen.tolist(), strict=True)
        ]
    return dataclasses.replace(source, captions=tuple(captions))


def with_names(source: Source, seed: int) -> Source:
    """Returns a source whose captions are the names of the classes, one for each image; `seed` is not used.

    >>> from jax_transfer.data.source import from_arrays
    >>> source = from_arrays(np.zeros((1, 8, 8), np.uint8), [0], class_names=["tree_frog"])
    >>> with_names(source, seed=0).captions
    (('tree frog',),)
    """
    names = [(spoken(name),) for name in source.class_names]
    return dataclasses.replace(source, captions=tuple(names[label] for label in source.labels))
