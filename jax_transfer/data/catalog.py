"""The data sets of the papers: their training and test splits, and the metrics that papers report on them.

Data sets outside the catalog work too: other `tfds:` data sets, with their `train` and `test` (or `validation`) splits,
and any folder. An entry that TFDS cannot build has a `layout`: download the files from the home page of the data set,
arrange them in this layout, and load them with `folder:`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Entry:
    """A data set of the catalog.

    Attributes:
      tfds: name of the TFDS builder.
      num_classes: number of classes.
      train, test: split expressions for TFDS, such as "train+validation".
      image_size: side in pixels of the images on which the papers train.
      metric: "accuracy" over all images, or "mean_class_accuracy", the mean of the accuracies of the classes.
      layout: how to arrange the files for `folder:`, for data sets that TFDS cannot build.
    """

    tfds: str
    num_classes: int
    train: str = "train"
    test: str = "test"
    image_size: int = 224
    metric: str = "accuracy"
    layout: str = ""


# Both `tfds:<key>` and `tfds:<name of the builder>` load an entry. The metrics follow Kornblith et al., 2019, Table 1.
CATALOG = {
    # Small images
    "mnist": Entry("mnist", 10, image_size=28),
    "fashion_mnist": Entry("fashion_mnist", 10, image_size=28),
    "cifar10": Entry("cifar10", 10, image_size=32),
    "cifar100": Entry("cifar100", 100, image_size=32),
    "tiny_imagenet": Entry(
        "tiny_imagenet",
        200,
        test="validation",
        image_size=64,
        layout="train/<wnid>/*.JPEG as unpacked, and val/ sorted into val/<wnid>/ by val_annotations.txt",
    ),
    # Pre-training
    "imagenet2012": Entry("imagenet2012", 1000, test="validation"),
    "places365": Entry("places365_small", 365, test="validation"),
    "inaturalist2017": Entry("i_naturalist2017", 5089, test="validation"),
    # 437,513 images for training and 24,426 for validation; those of the split "test" have no labels.
    "inaturalist2018": Entry("i_naturalist2018", 8142, test="validation"),
    # Targets of "inadequately pre-trained"; CIFAR-10 and CIFAR-100 above complete its nine targets
    "food101": Entry("food101", 101, test="validation"),
    "aircraft": Entry(
        "fgvc_aircraft",
        100,
        metric="mean_class_accuracy",
        layout="train/<variant>/*.jpg (trainval list, 6,667 images) and test/<variant>/*.jpg (3,333 images)",
    ),
    "stanford_cars": Entry("cars196", 196),
    "cub200": Entry("caltech_birds2011", 200),
    "flowers102": Entry("oxford_flowers102", 102, train="train+validation", metric="mean_class_accuracy"),
    "indoor67": Entry(
        "indoor67",
        67,
        layout="train/<scene>/*.jpg (TrainImages.txt, or 80 % of the images) and test/<scene>/*.jpg (the others)",
    ),
    "mura": Entry(
        "mura",
        2,
        layout="train/{negative,positive}/*.png and test/{negative,positive}/*.png (valid), one class per study label",
    ),
    # Targets of "ranking neural checkpoints", besides Flowers-102
    "caltech101": Entry("caltech101", 102, metric="mean_class_accuracy"),  # TFDS keeps background_google as a class
    # The split of all images that TFDS has, not one of the ten splits with 50 + 50 images per class.
    "sun397": Entry("sun397", 397, train="train+validation"),
    "patch_camelyon": Entry("patch_camelyon", 2),
    # Targets of "pre-training data reuse", besides Cars, CUB, SUN, Aircraft and Caltech
    "stanford_dogs": Entry("stanford_dogs", 120),
    "pets": Entry("oxford_iiit_pet", 37, metric="mean_class_accuracy"),
    "dtd": Entry("dtd", 47, train="train+validation"),
    # The first of the ten splits with 50 + 50 images per class, 19,850 for training, as in Kornblith et al. The
    # accuracies of "pre-training data reuse" fit such a split, which the paper does not name.
    "sun397_part1": Entry("sun397/standard-part1-120k", 397),
    # Captions, in Karpathy's split: 113,287 images for training and 5,000 each for validation ("val") and testing
    "coco_captions": Entry("coco_captions", 1, train="train+restval"),
    # Further medical target
    "shenzhen_cxr": Entry(
        "shenzhen_cxr",
        2,
        layout="normal/*.png and tuberculosis/*.png (last digit of the file name 0 or 1), and 30 % of the images for "
        "training as in the paper with folder:DIR?train_fraction=0.3",
    ),
    # Satellite images (RGB) in a single split, of which `train_fraction` says how many to train on.
    "eurosat": Entry("eurosat", 10, image_size=64),
}


def find(name: str) -> Entry | None:
    """Returns the entry for `tfds:<name>`, where the name is a key or the name of a builder; None if there is none.

    >>> find("cars196:2.1.0") == CATALOG["stanford_cars"]
    True
    >>> find("unknown") is None
    True
    >>> find("sun397/standard-part1-120k") == CATALOG["sun397_part1"]
    True
    """
    with_config = name.split(":")[0]
    for builder in (with_config, with_config.split("/")[0]):
        entry = CATALOG.get(builder) or next((entry for entry in CATALOG.values() if entry.tfds == builder), None)
        if entry:
            return entry
    return None


# (source, target) -> a sentence on images of the target that are also in the source. Only what is public is listed: the
# home pages of Stanford Dogs ("built using images and annotation from ImageNet") and of CUB-200-2011 (a warning) say
# so, as does the description of Tiny-ImageNet. The number for CUB is from Guo, 2016, "Overlap between ImageNet and
# CUB", who confirms the list of Jaderberg et al., 2015.
KNOWN_OVERLAPS = {
    ("imagenet2012", "stanford_dogs"): (
        "Stanford Dogs is made of ImageNet images, so part of a gain from reusing ImageNet may be leakage (Liu et al., "
        "2022, report 78.64 to 88.14 %)."
    ),
    ("tiny_imagenet", "stanford_dogs"): (
        "Stanford Dogs and Tiny-ImageNet are both made of ImageNet images, so part of a gain from reusing "
        "Tiny-ImageNet may be leakage."
    ),
    ("imagenet2012", "tiny_imagenet"): (
        "Tiny-ImageNet is made of ImageNet images, so part of a gain from reusing ImageNet may be leakage."
    ),
    ("imagenet2012", "cub200"): (
        "CUB-200-2011 shares images with ImageNet: 22 of its 5,794 test images are known to be among ImageNet's "
        "training images, so a small part of a gain from reusing ImageNet may be leakage."
    ),
}


def known_overlap(source_name: str, target_name: str) -> str:
    """Returns a sentence on images that two data sets are known to share; "" if none are known.

    Args:
      source_name, target_name: names of data sets, with or without options. Nothing is known of a folder.

    >>> known_overlap("tfds:imagenet2012", "tfds:stanford_dogs?fraction=0.5")[:41]
    'Stanford Dogs is made of ImageNet images,'
    >>> known_overlap("tfds:imagenet2012", "folder:stanford_dogs")
    ''
    """
    return KNOWN_OVERLAPS.get((_key(source_name), _key(target_name)), "")


def _key(name: str) -> str:
    """Returns the key in CATALOG of the data set `tfds:...[?options]`; "" if it has none."""
    kind, _, rest = name.partition(":")
    entry = find(rest.partition("?")[0]) if kind == "tfds" else None
    return next((key for key, other in CATALOG.items() if other is entry), "")
