"""Decides which folders of a data set are splits, which are classes, and which are not part of the data."""

import dataclasses
import os
import pathlib
import re
import unicodedata

from jax_transfer.records import InputError

EXTENSIONS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp", ".tif",
                        ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"))  # fmt: skip

# Files and folders that operating systems, file servers and archivers leave behind, and all names that begin with a
# dot. Case is ignored.
SYSTEM_NAMES = re.compile(
    r"\..*|@(eadir|tmp|recycle|sharebin|__thumb|transcode|recently-snapshot|synoresource)|#recycle|#snapshot|~snapshot"
    r"|__macosx|icon\r|__pycache__|lost\+found|found\.\d+|lost\.dir|\$?recycle\.bin|recycler|recycled"
    r"|\$winreagent|msocache|system volume information|network trash folder|temporary items"
    r"|thumbs\.db(:encryptable)?|ehthumbs(_vista)?\.db"
    r"|desktop\.ini|picasa\.ini|~\$.*|.*:zone\.identifier|wpsettings\.dat|indexervolumeguid",
    re.IGNORECASE | re.DOTALL,
)

# Words that mark a folder as a split, alone or joined with a neutral word (`trainset`, `images_test`).
ROLES = {
    "train": "train(?:ing|val)?|trn",
    "test": "test(?:ing)?|tst|holdout|heldout",
    "val": "val(?:id(?:ation|ate)?)?|dev(?:el(?:opment)?)?|eval(?:uation)?",
}
NEUTRAL = (
    "set|sets|data|dataset|images?|imgs?|pics|pictures|photos?|files|samples|split|part|subset|folder|dir|class(?:es)?"
)
ROLE_OF_WORD = {role: re.compile(f"(?:{stem})(?:{NEUTRAL})?|(?:{NEUTRAL})(?:{stem})") for role, stem in ROLES.items()}
NEUTRAL_WORD = re.compile(f"{NEUTRAL}|x|the|of|my")

# Words in the names of folders whose images have no labels.
UNLABELLED = {"unknown", "unlabeled", "unlabelled", "pred", "predict", "prediction", "predictions", "inference"}


def one_form(name: str) -> str:
    """Returns a name in Unicode normal form C, in which class names are compared; some systems store other forms."""
    return unicodedata.normalize("NFC", name)


def is_system(name: str) -> bool:
    """Returns whether a name is that of a hidden or system file or folder, which holds no data.

    >>> is_system("Thumbs.db"), is_system("cat")
    (True, False)
    """
    return SYSTEM_NAMES.fullmatch(name) is not None


def is_image(path: pathlib.Path) -> bool:
    """Returns whether the path has the extension of a supported image format."""
    return path.suffix.lower() in EXTENSIONS


def subfolders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders in `folder`, sorted by name; system folders are left out.

    Links to folders and broken links are included.

    Raises:
      InputError: if `folder` itself is a broken link.
    """
    check_link(folder)
    return [path for path in _entries(folder) if path.is_dir() or (path.is_symlink() and not path.exists())]


def stray_images(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the images directly in `folder`, sorted by name."""
    return [path for path in _entries(folder) if is_image(path) and path.is_file()]


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not is_system(entry.name))
    return [folder / name for name in names]


def check_link(path: pathlib.Path) -> None:
    """Checks that a path, if it is a link, is neither broken nor cyclic.

    Raises:
      InputError: if the link is broken or leads to a folder that contains the link.
    """
    if not path.is_symlink():
        return
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: a broken link to {os.readlink(path)}; repair or remove it.") from error
    if target.is_dir() and path.parent.resolve().is_relative_to(target):
        raise InputError(f"{path}: a link to a folder that contains it; remove it.")


def role(name: str) -> tuple[str | None, frozenset[str]]:
    """Returns the split that the name of a folder stands for, and the other words in the name.

    The split is "train", "test", "val" or None. Neutral words such as "images", which may occur in the name of any
    split, are left out.

    >>> role("seg_train"), role("Training_Images")
    (('train', frozenset({'seg'})), ('train', frozenset()))
    >>> role("cat")
    (None, frozenset({'cat'}))
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    joined = re.sub(r"(hold|held)[\W_]*out", r"\1out", spaced.casefold())
    words = re.findall(r"[^\W\d_]+", joined)
    role_of_word = {word: name for word in words for name, pattern in ROLE_OF_WORD.items() if pattern.fullmatch(word)}
    roles = set(role_of_word.values())
    if roles == {"train", "val"}:
        roles = {"train"}  # "trainval" is used for training
    if roles == {"test", "val"}:
        roles = {"test"}
    others = frozenset(word for word in words if word not in role_of_word and not NEUTRAL_WORD.fullmatch(word))
    return roles.pop() if len(roles) == 1 else None, others


@dataclasses.dataclass(frozen=True)
class Splits:
    """The folders of the splits.

    Attributes:
      train, test: the folders that hold the class folders; test is None if a part of train is used for testing.
      notes: sentences on folders that are not read.
      notes_on_splits: sentences that explain the choice of the splits where it is not obvious.
    """

    train: pathlib.Path
    test: pathlib.Path | None = None
    notes: tuple[str, ...] = ()
    notes_on_splits: tuple[str, ...] = ()


def find_splits(root: pathlib.Path) -> Splits:
    """Finds the training and test folders below `root`.

    A folder is a split if it holds class folders and its name contains a word such as "train" or "Test". If the name
    also contains other words, it counts as a split only if another split with the same classes has the same other words
    (seg_train, seg_test) or none; thus test_tube and train_station are classes. A `val` folder is used for testing if
    no test folder has class folders.

    Raises:
      InputError: if several folders could be the same split, or there is a test folder but no training folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     root = pathlib.Path(folder)
    ...     for name in ("Training/cat", "Training/dog", "Testing/cat"):
    ...         (root / name).mkdir(parents=True)
    ...     splits = find_splits(root)
    >>> splits.train.name, splits.test.name, splits.notes_on_splits
    ('Training', 'Testing', ('Training/ is used for training and Testing/ for testing.',))
    """
    folders = subfolders(root)
    roles = {folder: role(folder.name) for folder in folders}
    nested = {folder: bool(subfolders(folder)) for folder in folders if roles[folder][0]}
    groups = {
        name: [folder for folder in nested if roles[folder][0] == name and (nested[folder] or not roles[folder][1])]
        for name in ROLES
    }
    others = [*groups["test"], *groups["val"]]
    groups["train"] = [folder for folder in groups["train"] if _is_train(folder, others, roles)]
    train = _plainest(groups["train"], nested, root)
    plain_others = [folder for folder in others if not roles[folder][1]]
    if train is None or not (nested[train] or plain_others):
        lonely = [folder for folder in plain_others if nested[folder]]
        if lonely and train is None and not any(stray_images(folder) for folder in set(folders) - set(others)):
            raise InputError(
                _without_train(root, lonely[0].name, [folder for folder in folders if folder not in others])
            )
        _check_classes_by_split(root, roles)
        return Splits(root)
    words = roles[train][1]
    train = _inner(train)
    classes = _names(train)
    test, reason, unlabelled = None, "", []
    for name in ("test", "val"):
        group = [
            _inner(folder)
            for folder in groups[name]
            if roles[folder][1] in (words, frozenset()) or (not words and classes & _names(_inner(folder)))
        ]
        labelled = [folder for folder in group if _has_classes(folder, classes)]
        if test is None and labelled:
            test = _plainest(labelled, dict.fromkeys(labelled, True), root)
            reason = f"{_shown(unlabelled[0], root)} has no class folders" if unlabelled else "there is no test folder"
        unlabelled += [folder for folder in group if folder not in labelled]
    notes, notes_on_splits, mentioned = [], [], [folder for folder in (train, test) if folder]
    if test and role(test.name)[0] == "val":
        notes_on_splits.append(
            f"{_shown(train, root)} is used for training and {_shown(test, root)} for testing, because {reason}."
        )
        mentioned += [folder for folder in unlabelled[:1] if role(folder.name)[0] == "test"]
    elif test and {train, test} != {root / "train", root / "test"}:
        notes_on_splits.append(f"{_shown(train, root)} is used for training and {_shown(test, root)} for testing.")
    elif unlabelled and classes and test is None:
        notes_on_splits.append(
            f"{_shown(unlabelled[0], root)} has no class folders: a fifth of each class of {_shown(train, root)} is "
            "used for testing."
        )
        mentioned.append(unlabelled[0])
    elif test is None and not unlabelled:
        _check_rivals(train, [folder for folder in folders if not train.is_relative_to(folder)], root)
    if unread := [folder for folder in folders if not any(path.is_relative_to(folder) for path in mentioned)]:
        listed = ", ".join(f"{folder.name}/" for folder in unread[:3])
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        notes.append(f"{listed}{more} beside {_shown(train, root)} {'are' if len(unread) > 1 else 'is'} not read.")
    return Splits(train, test, tuple(notes), tuple(notes_on_splits))


def _without_train(root: pathlib.Path, split: str, others: list[pathlib.Path]) -> str:
    """Returns the error message for a test split without a training split."""
    advice = (
        f"rename {others[0].name}/ to train/ if that is the training set" if others else "add it with the same classes"
    )
    return f"{root}: has {split}/ but no train/; {advice}, or rename {split}/ if it is a class."


def _check_classes_by_split(root: pathlib.Path, roles: dict) -> None:
    """Checks that the folders are not splits of single classes: train_real, train_fake, test_real and test_fake.

    Raises:
      InputError: if they are splits of single classes.
    """
    for folder, (name, words) in roles.items():
        tests = [other for other, (split, same) in roles.items() if split in ("test", "val") and same == words]
        if name == "train" and words and tests:
            raise InputError(
                f"{root}: {folder.name}/ and {tests[0].name}/ seem to be two splits of one class; arrange the images "
                "as train/<class>/ and test/<class>/."
            )


def _check_rivals(train: pathlib.Path, others: list[pathlib.Path], root: pathlib.Path) -> None:
    """Checks that the folder train is a split and not one of several classes, such as a class of trains.

    Raises:
      InputError: if other folders that may be classes hold images, so that only the name suggests that train is a
        split.
    """
    classes = _names(train)
    rivals = [
        folder
        for folder in others
        if role(folder.name)[1] - UNLABELLED and not classes & _names(folder)
        if any(stray_images(part) for part in (folder, *subfolders(folder)))
    ]
    if rivals:
        listed = _listed([f"{folder.name}/" for folder in rivals])
        hold = "holds" if len(rivals) == 1 else "hold"
        raise InputError(
            f"{root}: {_shown(train, root)} may be a split or a class, since {listed} beside it {hold} other images. "
            f"To read it alone, name folder:{train} as the data set; if it is a class, move the images from its "
            "subfolders directly into it."
        )


def _is_train(folder: pathlib.Path, others: list[pathlib.Path], roles: dict) -> bool:
    """Returns whether the name of a "train" folder has no other words, or other words that match another split."""
    words = roles[folder][1]
    return not words or any(roles[other][1] in (words, frozenset()) for other in others)


def _has_classes(folder: pathlib.Path, classes: set[str]) -> bool:
    """Returns whether a split holds class folders: those of train, or others with names unlike `images`."""
    names = _names(folder)
    roles = {name: role(name) for name in names}
    specific = [name for name, (split, words) in roles.items() if not split and words - UNLABELLED]
    return bool(classes & names or specific or any(not re.search(r"[^\W\d_]", name) for name in names))


def _names(folder: pathlib.Path) -> set[str]:
    """Returns the names of the subfolders, in one Unicode form."""
    return {one_form(sub.name) for sub in subfolders(folder)}


def _shown(folder: pathlib.Path, root: pathlib.Path) -> str:
    return f"{folder.relative_to(root)}/"


def _plainest(folders: list[pathlib.Path], nested: dict, root: pathlib.Path) -> pathlib.Path | None:
    """Returns the folder with the plainest name among folders of one role, preferably one that holds folders.

    Raises:
      InputError: if several names are equally plain.
    """
    folders = [folder for folder in folders if nested[folder]] or folders
    exact = [folder for folder in folders if folder.name.casefold() in (*ROLES, "validation")]
    plain = [folder for folder in folders if not role(folder.name)[1]]
    group = next((group for group in (exact, plain, folders) if group), [])
    if len(group) > 1:
        listed = ", ".join(_shown(folder, root) for folder in group)
        raise InputError(f"{root}: {listed} could each be the {role(group[0].name)[0]} split; keep one of them here.")
    return group[0] if group else None


def _inner(folder: pathlib.Path) -> pathlib.Path:
    """Returns the inner folder of a nesting such as seg_train/seg_train, which some archives contain."""
    while len(inner := subfolders(folder)) == 1 and role(inner[0].name) == role(folder.name):
        if inner[0].is_symlink() or not subfolders(inner[0]) or stray_images(folder):
            break
        folder = inner[0]
    return folder


def check_structure(folder: pathlib.Path, classes: dict[str, list[pathlib.Path]]) -> list[str]:
    """Checks that the class folders really seem to be classes, and returns notes on the folders inside them.

    Images in folders below a class folder belong to that class.

    Args:
      folder: the folder that holds the class folders.
      classes: class name -> its folders.

    Raises:
      InputError: if all classes hold the same folders, a class holds folders with the names of the other classes, or
        the only class holds several folders.
    """
    below = {name: [sub for part in parts for sub in subfolders(part)] for name, parts in classes.items()}
    names = [set().union(*map(_names, parts)) for parts in classes.values()]
    shared = sorted(set.intersection(*names))
    same = len(shared) > 1 and all(folder_names == names[0] for folder_names in names)
    if same or (len(shared) > 1 and not any(stray_images(part) for parts in classes.values() for part in parts)):
        listed = _listed(shared)
        if len(classes) == 1:
            only = next(iter(classes.values()))[0]
            raise InputError(
                f"{folder}: its only folder {only.name}/ holds the folders {listed}; if these are the classes or the "
                f"splits, name folder:{only} as the data set."
            )
        raise InputError(
            f"{folder}: {_listed([f'{name}/' for name in classes])} all hold the same folders ({listed}), so they do "
            "not seem to be classes; arrange the images as train/<class>/ and test/<class>/, or as <class>/."
        )
    if not any(below.values()):
        return []
    for name, subs in below.items():
        again = sorted({one_form(sub.name) for sub in subs if not sub.is_symlink()} & set(classes) - {name})
        if len(again) > 1:
            raise InputError(
                f"{classes[name][0]}: holds folders with the names of the classes beside it ({_listed(again)}), so it "
                "seems to be a copy of the data set and not a class; remove it, or use it as the data set instead."
            )
    count, example = sum(map(bool, below.values())), next(subs[0] for subs in below.values() if subs)
    return [
        f"{count} of {len(classes)} class folders contain subfolders (such as {example.relative_to(folder)}/); their "
        "images belong to the class."
    ]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
