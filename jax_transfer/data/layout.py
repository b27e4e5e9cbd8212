"""What the folders below a data set's folder are: splits, classes, or nothing of the data."""

import dataclasses
import os
import pathlib
import re
import unicodedata

from jax_transfer.records import InputError

EXTENSIONS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp", ".tif",
                        ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"))  # fmt: skip

# What systems, servers and archives leave in folders, in any case; so do names that begin with a dot.
SYSTEM_NAMES = re.compile(
    r"\..*|@(eadir|tmp|recycle|sharebin|__thumb|transcode|recently-snapshot|synoresource)|#recycle|#snapshot|~snapshot"
    r"|__macosx|icon\r|__pycache__|lost\+found|found\.\d+|lost\.dir|\$?recycle\.bin|recycler|recycled|\$winreagent|msocache"
    r"|system volume information|network trash folder|temporary items|thumbs\.db(:encryptable)?|ehthumbs(_vista)?\.db"
    r"|desktop\.ini|picasa\.ini|~\$.*|.*:zone\.identifier|wpsettings\.dat|indexervolumeguid",
    re.IGNORECASE | re.DOTALL,
)

# Words of which one in a folder's name makes it a split, alone or in one word with what is said of splits.
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


UNLABELLED = {"unknown", "unlabeled", "unlabelled", "pred", "predict", "prediction", "predictions", "inference"}


def one_form(name: str) -> str:
    """A name in the one Unicode form in which names of classes are compared: some systems write it in another one."""
    return unicodedata.normalize("NFC", name)


def is_system(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or was left by a system and holds no data."""
    return SYSTEM_NAMES.fullmatch(name) is not None


def is_image(path: pathlib.Path) -> bool:
    """Whether the ending is that of an image that is read."""
    return path.suffix.lower() in EXTENSIONS


def subfolders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders in `folder` that are no system folders, links to folders and to nothing included, by name.

    Raises:
      InputError: if `folder` is itself a link to nothing.
    """
    check_link(folder)
    return [path for path in _entries(folder) if path.is_dir() or (path.is_symlink() and not path.exists())]


def stray_images(folder: pathlib.Path) -> list[pathlib.Path]:
    """The images right in `folder`, by name."""
    return [path for path in _entries(folder) if is_image(path) and path.is_file()]


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not is_system(entry.name))
    return [folder / name for name in names]


def check_link(path: pathlib.Path) -> None:
    """Raises InputError for a link to nothing, and to a folder it lies in; any other file or folder may be linked to."""
    if not path.is_symlink():
        return
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: a link to nothing ({os.readlink(path)}); repair or remove it.") from error
    if target.is_dir() and path.parent.resolve().is_relative_to(target):
        raise InputError(f"{path}: a link to a folder it lies in; remove it.")


def role(name: str) -> tuple[str | None, frozenset[str]]:
    """(train, test, val or None; the other words of the name, those that any split may have left out).

    seg_train -> ("train", {"seg"}); Training_Images -> ("train", {}); cat -> (None, {"cat"}).
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    whole = re.sub(r"(hold|held)[\W_]*out", r"\1out", spaced.casefold())
    words = re.findall(r"[^\W\d_]+", whole)
    roles = {word: found for word in words for found, pattern in ROLE_OF_WORD.items() if pattern.fullmatch(word)}
    found = set(roles.values())
    if found == {"train", "val"}:
        found = {"train"}  # both together are trained on
    if found == {"test", "val"}:
        found = {"test"}
    others = frozenset(word for word in words if word not in roles and not NEUTRAL_WORD.fullmatch(word))
    return found.pop() if len(found) == 1 else None, others


@dataclasses.dataclass(frozen=True)
class Splits:
    """train, test: the folders that hold the class folders; test is None if a part of train is tested on."""

    train: pathlib.Path
    test: pathlib.Path | None = None
    notes: tuple[str, ...] = ()


def find_splits(root: pathlib.Path) -> Splits:
    """Which folders below `root` are trained and tested on, and notes on what is not evident about that.

    A folder is a split if its name says so, in any case and with other words around it, and class folders lie in it. A
    name with words of its own counts if another split has the same ones (seg_train, seg_test) or none, and holds the
    same classes: test_tube and train_station are classes. A split `val` is tested on if no test folder has classes.

    Raises:
      InputError: for splits that cannot be told apart, and a test folder without one to train on.
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
    train = _the_one(groups["train"], nested, root)
    plain_others = [folder for folder in others if not roles[folder][1]]
    if train is None or not (nested[train] or plain_others):
        lonely = [folder for folder in plain_others if nested[folder]]
        if lonely and train is None and not any(stray_images(folder) for folder in set(folders) - set(others)):
            raise InputError(_without_train(root, lonely[0].name, [one for one in folders if one not in others]))
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
            test = _the_one(labelled, dict.fromkeys(labelled, True), root)
            reason = (
                f"{_shown(unlabelled[0], root)} holds no class folders" if unlabelled else "there is no test folder"
            )
        unlabelled += [folder for folder in group if folder not in labelled]
    notes, named = [], [folder for folder in (train, test) if folder]
    if test and role(test.name)[0] == "val":
        notes.append(f"{_shown(train, root)} is trained on and {_shown(test, root)} tested on, because {reason}.")
        named += [folder for folder in unlabelled[:1] if role(folder.name)[0] == "test"]
    elif test and {train, test} != {root / "train", root / "test"}:
        notes.append(f"{_shown(train, root)} is trained on and {_shown(test, root)} tested on.")
    elif unlabelled and classes and test is None:
        notes.append(
            f"{_shown(unlabelled[0], root)} holds no class folders: a fifth of each class of {_shown(train, root)} is "
            "tested on."
        )
        named.append(unlabelled[0])
    elif test is None and not unlabelled:
        _check_rivals(train, [folder for folder in folders if not train.is_relative_to(folder)], root)
    if unread := [folder for folder in folders if not any(one.is_relative_to(folder) for one in named)]:
        listed = ", ".join(f"{folder.name}/" for folder in unread[:3])
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        notes.append(f"{listed}{more} beside {_shown(train, root)} {'are' if len(unread) > 1 else 'is'} not read.")
    return Splits(train, test, tuple(notes))


def _without_train(root: pathlib.Path, split: str, others: list[pathlib.Path]) -> str:
    add = (
        f"rename {others[0].name}/ to train/ if that is the training set" if others else "add it with the same classes"
    )
    return f"{root}: has {split}/ but no train/; {add}, or rename {split}/ if it is a class."


def _check_classes_by_split(root: pathlib.Path, roles: dict) -> None:
    """Raises InputError if the folders are splits of classes, such as train_real, train_fake, test_real and test_fake."""
    for folder, (name, words) in roles.items():
        tested = [other for other, (split, same) in roles.items() if split in ("test", "val") and same == words]
        if name == "train" and words and tested:
            raise InputError(
                f"{root}: {folder.name}/ and {tested[0].name}/ seem to be two splits of one class; arrange the images as "
                "train/<class>/ and test/<class>/."
            )


def _check_rivals(train: pathlib.Path, others: list[pathlib.Path], root: pathlib.Path) -> None:
    """Raises InputError if a folder that may be a class, such as the vehicle, is all that makes train a split."""
    classes = _names(train)
    rivals = [
        folder
        for folder in others
        if role(folder.name)[1] - UNLABELLED and not classes & _names(folder)
        if any(stray_images(one) for one in (folder, *subfolders(folder)))
    ]
    if rivals:
        listed = _listed([f"{folder.name}/" for folder in rivals])
        raise InputError(
            f"{root}: {_shown(train, root)} may be a split or a class, as {listed} beside it "
            f"hold{'s' * (len(rivals) == 1)} other images; to read it alone, name folder:{train} as the data set; if it "
            "is a class, move its images out of their folders, right into it."
        )


def _is_train(folder: pathlib.Path, others: list[pathlib.Path], roles: dict) -> bool:
    words = roles[folder][1]
    return not words or any(roles[other][1] in (words, frozenset()) for other in others)


def _has_classes(folder: pathlib.Path, classes: set[str]) -> bool:
    """Whether the folders in a split are classes: those of train, or at least not just `images` and the like."""
    found = _names(folder)
    roles = {name: role(name) for name in found}
    said = [name for name, (split, words) in roles.items() if not split and words - UNLABELLED]
    return bool(classes & found or said or any(not re.search(r"[^\W\d_]", name) for name in found))


def _names(folder: pathlib.Path) -> set[str]:
    return {one_form(sub.name) for sub in subfolders(folder)}


def _shown(folder: pathlib.Path, root: pathlib.Path) -> str:
    return f"{folder.relative_to(root)}/"


def _the_one(folders: list[pathlib.Path], nested: dict, root: pathlib.Path) -> pathlib.Path | None:
    """The folder of a role: the one of the plainest name among those that hold folders."""
    folders = [folder for folder in folders if nested[folder]] or folders
    exact = [folder for folder in folders if folder.name.casefold() in (*ROLES, "validation")]
    plain = [folder for folder in folders if not role(folder.name)[1]]
    group = next((group for group in (exact, plain, folders) if group), [])
    if len(group) > 1:
        named = ", ".join(_shown(folder, root) for folder in group)
        raise InputError(f"{root}: {named} could each be the {role(group[0].name)[0]} split; keep one of them here.")
    return group[0] if group else None


def _inner(folder: pathlib.Path) -> pathlib.Path:
    """The inner one of seg_train/seg_train, as some archives unpack."""
    while len(inner := subfolders(folder)) == 1 and role(inner[0].name) == role(folder.name):
        if inner[0].is_symlink() or not subfolders(inner[0]) or stray_images(folder):
            break
        folder = inner[0]
    return folder


def check_structure(folder: pathlib.Path, classes: dict[str, list[pathlib.Path]]) -> list[str]:
    """Notes on folders below the class folders (name -> folders) of `folder`: all images in them are of the class.

    Raises:
      InputError: if the classes look like something else: all hold the same folders, or there is but one with several.
    """
    below = {name: [sub for part in parts for sub in subfolders(part)] for name, parts in classes.items()}
    names = [set().union(*map(_names, parts)) for parts in classes.values()]
    shared = sorted(set.intersection(*names))
    same = len(shared) > 1 and all(found == names[0] for found in names)
    if same or (len(shared) > 1 and not any(stray_images(part) for parts in classes.values() for part in parts)):
        listed = _listed(shared)
        if len(classes) == 1:
            only = next(iter(classes.values()))[0]
            raise InputError(
                f"{folder}: its only folder {only.name}/ holds the folders {listed}; if these are the classes, or the "
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
                f"{classes[name][0]}: holds folders named as the classes beside it ({_listed(again)}), so it does not seem "
                "to be a class but the data set once more; remove it, or name it alone as the data set."
            )
    count, example = sum(map(bool, below.values())), next(found[0] for found in below.values() if found)
    return [
        f"{count} of {len(classes)} class folders hold folders of their own (such as {example.relative_to(folder)}/), "
        "whose images are of that class."
    ]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
