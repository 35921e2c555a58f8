"""GPT-2's alphabet: the character that stands for each byte in the spelling of a byte-level vocabulary's
tokens."""


def _characters() -> list[str]:
    """The byte itself where Latin-1 can print it, otherwise the next character from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 0x100 + others.index(byte)) for byte in range(256)]


CHARACTERS = tuple(_characters())
"""Byte → character."""
BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}
"""Character → byte."""
