"""The size of a teacher, from its config.json: parameters, and the bytes that it takes in vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number, by the name of its type in config.json."""

_FIELDS = {
    "vocab_size": "vocabulary",
    "hidden_size": "hidden",
    "intermediate_size": "inner",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_width",
    "num_local_experts": "experts",
    "num_experts_per_tok": "experts_per_token",
}
"""Field of config.json → field of TeacherSize. teacher/weights.py checks the same fields before an engine is
loaded."""


@dataclass(frozen=True)
class TeacherSize:
    """What decides the memory of a GPT-OSS."""

    name: str
    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    experts: int
    experts_per_token: int
    packed: bool
    """Whether the experts' matrices are stored in MXFP4."""
    itemsize: int
    """Bytes of every other number."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str) -> "TeacherSize":
        """The size that a config.json describes.

        Raises ValueError, which names the field, if one is missing or has another type.
        """
        numbers = {}
        for written, field in _FIELDS.items():
            value = config.get(written)
            if type(value) is not int or value < 1:
                raise ValueError(f"config.json: {written} is {value!r:.80}, expected a positive integer")
            numbers[field] = value
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        if dtype not in BYTES:
            raise ValueError(f"config.json: dtype is {dtype!r:.80}, expected one of {', '.join(BYTES)}")
        return cls(
            name,
            **numbers,
            packed=config.get("quantization_config") is not None,
            itemsize=BYTES[dtype],
        )

    @property
    def expert_numbers(self) -> int:
        """Numbers in the experts' matrices: gate and up, and down."""
        return self.layers * self.experts * 3 * self.hidden * self.inner

    @property
    def head_numbers(self) -> int:
        """Numbers in the output matrix."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        attention = (
            (self.hidden + 1) * (queries + 2 * keys) + (queries + 1) * self.hidden + self.heads  # and sinks
        )
        mixture = self.experts * (self.hidden + 1) + self.experts * (2 * self.inner + self.hidden)
        return (
            2 * self.head_numbers  # embeddings and output
            + self.layers * (2 * self.hidden + attention + mixture)
            + self.expert_numbers
            + self.hidden
        )

    @property
    def stored(self) -> int:
        """Bytes of the checkpoint, which vLLM holds as it is. MXFP4 has 32 numbers in 17 bytes."""
        if not self.packed:
            return self.parameters * self.itemsize
        return (self.parameters - self.expert_numbers) * self.itemsize + self.expert_numbers * 17 // 32

    @property
    def output(self) -> int:
        """Bytes of the output matrix, of which every rank of a TeacherForced stage has a copy."""
        return self.head_numbers * self.itemsize

    @property
    def cached(self) -> int:
        """Bytes of a position's keys and values."""
        return self.layers * 2 * self.kv_heads * self.head_width * self.itemsize

    @property
    def activations(self) -> int:
        """Bytes of a position's activations in one layer, which is all that a forward holds: hidden states,
        residual and attention, and of each of its experts what goes in and out, gate and up, and their
        product. An estimate."""
        return self.itemsize * (8 * self.hidden + self.experts_per_token * (2 * self.hidden + 4 * self.inner))


def _gpt_oss(name: str, layers: int, experts: int) -> TeacherSize:
    return TeacherSize(name, 201_088, 2880, 2880, layers, 64, 8, 64, experts, 4, True, 2)


KNOWN = {
    teacher.name: teacher for teacher in (_gpt_oss("gpt-oss-20b", 24, 32), _gpt_oss("gpt-oss-120b", 36, 128))
}
"""OpenAI's releases, by the last part of teacher.model."""


def known_teacher(model: str) -> TeacherSize | None:
    """The release that teacher.model names, such as hf://openai/gpt-oss-20b@main or s3://models/gpt-oss-20b;
    None if it names another model."""
    return KNOWN.get(model.rstrip("/").rpartition("/")[2].partition("@")[0])
