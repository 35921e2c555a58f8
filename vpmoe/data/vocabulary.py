"""The o200k_harmony vocabulary in numbers: its identity, its size and the ids of its special tokens. No
tokenizer is imported.

Every module that needs one of these numbers takes it from here. The vocabulary file itself is in
vocabulary_file.py.
"""

TOKENIZER = "o200k_harmony"
"""tiktoken's name of the encoding: o200k_base and the Harmony special tokens."""

VOCABULARY_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
"""sha256 of o200k_base.tiktoken. It identifies the tokenizer in manifests and dataset ids."""

TEXT_IDS = 199_998
"""Ids 0 … TEXT_IDS − 1 are pieces of text; all ids above are special tokens."""

VOCABULARY_SIZE = 201_088
"""Ids 0 … 201,087, padded as in GPT-OSS; all are defined and none is masked. openai-harmony also decodes
201088, by mistake; we never write that id."""

END_OF_DOCUMENT = 199_999
"""`<|endoftext|>`. It ends every document of a dataset."""

PADDING = END_OF_DOCUMENT
"""The id at positions without a document: GPT-OSS' own padding id. Nothing attends to it and it is never a
target."""

RETURN = 200_002
CHANNEL = 200_005
START = 200_006
END = 200_007
MESSAGE = 200_008
CALL = 200_012

STOP_IDS = (RETURN, CALL)
"""Tokens that end a completion and are part of it. `<|end|>` is none of them: the final message follows the
reasoning."""
