"""Parts of a Harmony completion as text, and their ids."""

import numpy as np

from vpmoe.data import vocabulary_file


def ids(text: str) -> np.ndarray:
    """The ids of a text. Names of special tokens are encoded as these tokens."""
    return np.array(vocabulary_file.encoding().encode(text, allowed_special="all"), np.int32)


ANALYSIS = "<|channel|>analysis<|message|>hm<|end|>"
ASSISTANT = "<|start|>assistant"
FINAL_RETURN = "<|channel|>final<|message|>yes<|return|>"
FINAL_END = "<|channel|>final<|message|>yes<|end|>"
