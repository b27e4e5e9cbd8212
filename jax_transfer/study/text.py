"""Language in a study: the vocabulary of a pre-training with captions, and the tokens on which it trains."""

import pathlib
from collections.abc import Mapping

from jax_transfer import devices
from jax_transfer.data.source import Source
from jax_transfer.data.vocabulary import Vocabulary, check_has_captions, read_vocabulary, train_vocabulary, with_tokens
from jax_transfer.logs import log
from jax_transfer.records import InputError

FILE = "vocabulary.json"  # beside the `checkpoints` of the pre-training


def vocabulary(source: Source, folder: pathlib.Path, settings: Mapping) -> Vocabulary:
    """Returns the vocabulary of a pre-training: that in its folder once it has a checkpoint, else a new one.

    Args:
      source: the training split.
      folder: the folder of the pre-training.
      settings: the settings of its objective, with the most tokens of a new vocabulary as "vocabulary_size".

    Raises:
      InputError: if the source has no captions, or the file of a pre-training with checkpoints cannot be used.
    """
    path, size = folder / FILE, settings["vocabulary_size"]
    if any((folder / "checkpoints").glob("[0-9]*")):
        found = read_vocabulary(path)
        if len(found) > size:
            raise InputError(
                f"{path} has {len(found)} tokens, more than the vocabulary_size = {size} of the objective: restore it, "
                "or use another --workdir."
            )
        return found
    check_has_captions(source)
    trained = train_vocabulary((caption for captions in source.captions for caption in captions), size)
    if devices.is_first_process():
        trained.save(path)
    log.info("%s: a vocabulary of %d tokens from the captions, in %s.", source.name, len(trained), path)
    return trained


def with_language(source: Source, folder: pathlib.Path, settings: Mapping) -> Source:
    """Returns the training split of a pre-training with the tokens of its captions in `extra`.

    The arguments are those of `vocabulary`; "context_length" in `settings` is the number of tokens of a caption.

    Raises:
      InputError: if the source has no captions, or the vocabulary cannot be used.
    """
    check_has_captions(source)
    return with_tokens(source, vocabulary(source, folder, settings), settings["context_length"])
