"""The memory of a GPU as text: the form of runtime.gpuMemory."""

import re

GIB = 1 << 30
CARD_MEMORY = r"[1-9][0-9]{0,3}Gi?"
"""Pattern of runtime.gpuMemory."""


def parse_card_memory(text: str) -> int:
    """Bytes of a text that matches CARD_MEMORY. Raises ValueError for any other."""
    if re.fullmatch(CARD_MEMORY, text) is None:
        raise ValueError(f"{text!r} is not a memory size such as 80G or 80Gi")
    return int(text.rstrip("Gi")) * (GIB if text.endswith("i") else 10**9)


def cel_card_memory(text: str) -> str:
    """CEL for the bytes of `text`, which matches CARD_MEMORY."""
    return (
        f"({text}.endsWith('i') ? int({text}.replace('Gi', '')) * {GIB} : "
        f"int({text}.replace('G', '')) * {10**9})"
    )
