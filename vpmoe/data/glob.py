"""Globs of object keys, as in dataset.source: their regular expression, and how to write a key as a glob.

`*` matches any characters within a folder, `**` any across folders, `?` one character within a folder, and
`[abc]` or `[a-z]` one of a set. All else stands for itself: `{ } \\ : ! ]` and spaces too. A `*`, `?` or `[`
of a key is written as a set: `[*]`, `[?]`, `[[]`. What other globs have beyond that is rejected, not guessed.
"""

import re

SPECIAL = re.compile(r"[*?\[]")
"""The characters that do not stand for themselves."""

CLASS = re.compile(r"\[([:.=]).*\1")
"""The content of a set that begins as a character class of POSIX does, `[[:alpha:]]`."""


def escape(key: str) -> str:
    """The glob that matches exactly this key."""
    return SPECIAL.sub(r"[\g<0>]", key)


def literal_prefix(glob: str) -> str:
    """What every key that the glob matches begins with."""
    return SPECIAL.split(glob, maxsplit=1)[0]


def glob_pattern(glob: str) -> re.Pattern[str]:
    """The regular expression of a glob; it must match the whole key.

    Raises ValueError, with the remedy, for a malformed or unsupported set.
    """
    patterns = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    tokens = re.split(r"(\*\*/?|\*|\?|\[[^\]]*\]?)", glob)
    return re.compile(
        "".join(
            patterns.get(token) or (_set(token) if token.startswith("[") else re.escape(token))
            for token in tokens
        ),
        re.DOTALL,
    )


def _set(token: str) -> str:
    """The regular expression of one set, brackets included."""
    content = token[1:].removesuffix("]")
    if not token.endswith("]") or len(token) == 1:
        raise ValueError(f"no ] closes {token}. Write [[] for a bracket that is part of a name.")
    if not content:
        raise ValueError("[] is a set without characters. Write [[]] for a pair of brackets in a name.")
    if content[0] in "!^":
        raise ValueError(
            f"{token} negates a set, which is not supported. Name the characters that are wanted, or write "
            f"{content[0]} last in the set if it is one of them."
        )
    if CLASS.match(content):
        raise ValueError(
            f"{token}] is a character class, which is not supported. Write a range such as [a-z]."
        )
    if "/" in content:
        raise ValueError(
            f"{token} holds a slash, which no set matches. Write the folders outside of the set."
        )
    members, rest = [], content
    while rest:
        first, range_, last = rest[0], rest[1:2] == "-" and len(rest) > 2, rest[2:3]
        if range_ and first > last:
            raise ValueError(
                f"{token} has the range {first}-{last}, which is backwards. Write {last}-{first}, or put the "
                "hyphen last if it is one of the characters."
            )
        members.append(f"{re.escape(first)}-{re.escape(last)}" if range_ else re.escape(first))
        rest = rest[3 if range_ else 1 :]
    return f"(?!/)[{''.join(members)}]"
