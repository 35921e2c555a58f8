"""Parts of a Harmony completion as text, and their ids."""

import numpy as np

from vpmoe.data import vocabulary_file


def ids(text: str) -> np.ndarray:
    """Ids of a text, in which the names of special tokens are encoded as these tokens."""
    return np.array(vocabulary_file.encoding().encode(text, allowed_special="all"), np.int32)


THINK, OPEN = "<|channel|>analysis<|message|>hm<|end|>", "<|start|>assistant"


SAY, SAID = "<|channel|>final<|message|>yes<|return|>", "<|channel|>final<|message|>yes<|end|>"
