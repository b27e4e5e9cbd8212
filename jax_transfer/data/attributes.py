"""Captions from the names of classes and from what can be computed of the pixels, for retrieval without real captions.

They describe how light an image is, how strong its contrasts are, and the colours of its parts. They are no language of
people: what they say of an image can be learned without knowing any object but its class.
"""

import colorsys
import dataclasses

import numpy as np
from jaxtyping import UInt8

from jax_transfer.data.source import Source
from jax_transfer.data.templates import spoken

NOTE = (
    "Its captions are made from the names of the classes and from the brightness, contrast and colours of the images."
)
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
BOUNDS = (20, 45, 70, 165, 200, 260, 300, 340)  # degrees of the hue at which each colour ends; above, it is red again
TEMPLATES = (
    "a {light} photo of {a_name}, {upper_left} and {upper_right} above, {lower_left} and {lower_right} below.",
    "{a_name} in a {light} picture with {contrast} contrast, {middle} in the middle, {top} above and {bottom} below.",
    "{main} is the main colour of this {light} image of {a_name}, with {left} to the left and {right} to the right.",
    "this {name} has {upper_left} in the upper left and {lower_right} in the lower right, and {contrast} contrast.",
    "a picture with {contrast} contrast that shows {a_name}, {bottom} below, {top} above and {middle} in between.",
)
CHUNK = 1000  # images that are read at a time


def attributes(image: UInt8[np.ndarray, "h w *c"]) -> dict[str, str]:
    """Describes the light, the contrast and the colours of an image and of its parts.

    The light is the mean of the grey levels, the contrast their standard deviation, a colour that of the mean pixel.

    >>> image = np.zeros((4, 4, 3), np.uint8)
    >>> image[:2, :, 0] = 255
    >>> words = attributes(image)
    >>> words["light"], words["contrast"], words["top"], words["lower_left"]
    ('dark', 'low', 'red', 'black')
    """
    pixels = (image if image.ndim == 3 else image[..., None]).astype(np.float32) / 255
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    (top, bottom), (left, right) = (_halves(size) for size in pixels.shape[:2])
    middle, whole = tuple(slice(size // 4, -(-3 * size // 4)) for size in pixels.shape[:2]), slice(None)
    parts = {
        "main": (whole, whole), "middle": middle,
        "top": (top, whole), "bottom": (bottom, whole), "left": (whole, left), "right": (whole, right),
        "upper_left": (top, left), "upper_right": (top, right),
        "lower_left": (bottom, left), "lower_right": (bottom, right),
    }  # fmt: skip
    return {
        "light": ("dark", "dim", "light", "bright")[int(np.searchsorted((0.3, 0.45, 0.6), grey.mean()))],
        "contrast": ("low", "medium", "strong")[int(np.searchsorted((0.15, 0.22), grey.std()))],
        **{name: colour(*map(float, pixels[part].mean((0, 1)))) for name, part in parts.items()},
    }


def _halves(size: int) -> tuple[slice, slice]:
    return slice(0, max(1, size // 2)), slice(size // 2, size)


def colour(red: float, green: float, blue: float) -> str:
    """Names a colour, whose three parts are in [0, 1]: a hue, or black, grey or white, and whether it is dark or pale.

    >>> colour(0.9, 0.1, 0.1), colour(0.5, 0.5, 0.52), colour(0.1, 0.15, 0.3), colour(0.7, 0.9, 0.7)
    ('red', 'grey', 'dark blue', 'pale green')
    """
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    if value < 0.15:
        return "black"
    if saturation < 0.12:
        return "white" if value > 0.85 else "pale grey" if value > 0.65 else "grey" if value > 0.4 else "dark grey"
    tone = "dark " if value < 0.4 else "pale " if value > 0.6 and saturation < 0.3 else ""
    return tone + (*COLOURS, COLOURS[0])[int(np.searchsorted(BOUNDS, 360 * hue))]


def with_attributes(source: Source, seed: int) -> Source:
    """Returns a source with a caption from each of TEMPLATES for every image; `seed` is not used.

    Every image is read. Images and labels, and so the fingerprint, are the same.

    >>> from jax_transfer.data.source import from_arrays
    >>> source = from_arrays(np.zeros((1, 8, 8), np.uint8), [0], class_names=["tree_frog"])
    >>> with_attributes(source, seed=0).captions[0][2]
    'black is the main colour of this dark image of a tree frog, with black to the left and black to the right.'
    """
    names, captions = [spoken(name) for name in source.class_names], []
    for start in range(0, len(source), CHUNK):
        indices = range(start, min(start + CHUNK, len(source)))
        for i, image in zip(indices, source.read(indices), strict=True):
            name = names[source.labels[i]]
            article = "an" if name[:1] in "aeiou" else "a"
            words = {"name": name, "a_name": f"{article} {name}", **attributes(image)}
            captions.append(tuple(template.format(**words) for template in TEMPLATES))
    return dataclasses.replace(source, captions=tuple(captions), notes=(*source.notes, NOTE))
