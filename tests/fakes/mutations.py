"""Random damage to documents: what people, other programs and other versions make of a file."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

WEIRD: tuple[Any, ...] = (
    None,
    True,
    "",
    "x" * 3000,
    "\ud800",
    "a\x00b\nc",
    "../../etc",
    "s3://",
    "٣",
    0,
    -1,
    2**31,
    2**70,
    10**25,
    0.5,
    1e308,
    float("nan"),
    float("-inf"),
    [],
    [[]],
    {},
    {"a": {"b": []}},
    [None] * 50,
)
"""Values that take the place of others."""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) in a JSON value, containers before what they hold."""
    for key in (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        yield value, key
        yield from places(value[key])


def mutate_value(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one to three values replaced, removed, doubled, swapped or renamed."""
    changed = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(places(changed))
        if not found:
            return copy.deepcopy(rng.choice(WEIRD))
        container, key = rng.choice(found)
        match rng.randrange(6):
            case 0:
                del container[key]
            case 1 if isinstance(container, list):
                container.append(copy.deepcopy(container[key]))
            case 1:
                container[f"{key}X"] = container.pop(key)
            case 2:
                other, there = rng.choice(found)
                container[key] = copy.deepcopy(other[there]) if there in _keys(other) else 7
            case _:
                container[key] = copy.deepcopy(rng.choice(WEIRD))
    return changed


def _keys(container: Any) -> Any:
    return container if isinstance(container, dict) else range(len(container))


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """The bytes cut off, partly overwritten, doubled, or replaced by something else."""
    start, stop = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    choices: tuple[Callable[[], bytes], ...] = (
        lambda: b"",
        lambda: data[:start],
        lambda: data[start:],
        lambda: data[:start] + data[stop:],
        lambda: data[:start] + rng.randbytes(min(16, stop - start)) + data[stop:],
        lambda: data + data,
        lambda: (
            data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :]
            if start < len(data)
            else b"\xff\xfe"
        ),
        lambda: b"[" * 1_500,
        lambda: b"9" * 5_000,
        lambda: b"null",
        lambda: b"<html><body>Sign in</body></html>",
        lambda: rng.randbytes(200),
    )
    return rng.choice(choices)()


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON document changed in its values (mostly), or in its bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(data, rng)
    return json.dumps(mutate_value(json.loads(data), rng)).encode(errors="surrogatepass")
