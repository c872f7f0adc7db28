"""Valid inputs made hostile: bytes and JSON nodes changed at random, reproducibly by seed."""

import copy
import json
import random
from typing import Any

NASTY = (
    None, True, False, 0, -1, 1e999, -0.0, 2**63, 10**400, float("nan"), "", " ", "null", "\x00",
    "\u202e\u2066evil\u2069", "\x1b[2J", "\ud800", "{{ 7 * 7 }}", "{% for x in y %}", "${HOME}",
    "<script>alert(1)</script>", "'; DROP TABLE verdicts; --", "../../etc/passwd", "/dev/zero",
    "file:///etc/passwd", "a" * 5000, [], [[]], {}, {"": None}, ["x"] * 50, [None],
    {"role": "user"}, [{"role": "user", "content": 3}], [{"role": "assistant", "content": "x"}],
    "compliant", "violating", "unsure", "en\u0301", "\ufeff", "1", "0.5",
    "!!python/object/apply:os.system [id]",
    "&a [*a]", "|", ": :", "- -", "?", "#", "%", "@",
)  # fmt: skip
PIECES = [
    *(json.dumps(value).encode() for value in NASTY if value != 10**400),
    b"[" * 3000, b'{"a":' * 500,
    b"\xff\xfe", b"\x00", b"\r\n", b"\n\n", b"\xed\xa0\x80", b"1e400", b"-", b"NaN", b"\\ud800",
    b"*a", b"&a", b"<<:", b"!!binary", b"? ", b"---\n",
]  # fmt: skip


def of_bytes(chance: random.Random, data: bytes) -> bytes:
    """One to four changes anywhere."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(out) + 1)
        size = min(chance.choice((1, 1, 2, 8, 64)), len(out) - at)
        match chance.randrange(6):
            case 0 if size:
                out[at] ^= 1 << chance.randrange(8)
            case 1:
                del out[at : at + size]
            case 2:
                out[at:at] = chance.choice(PIECES)
            case 3:
                out[at : at + size] = chance.choice(PIECES)
            case 4:
                out[at:at] = bytes(chance.randrange(256) for _ in range(size))
            case 5:
                start = chance.randrange(len(out) + 1)
                out[at:at] = out[start : start + 64]
    return bytes(out)


def of_json(chance: random.Random, value: Any) -> Any:
    """One to three nodes replaced, dropped, doubled or renamed."""
    out = [copy.deepcopy(value)]
    for _ in range(chance.randint(1, 3)):
        parent, key = chance.choice(list(_nodes(out)))
        match chance.randrange(4):
            case 1 if parent is not out:
                del parent[key]
            case 2 if isinstance(parent, list) and parent is not out:
                parent.insert(key, copy.deepcopy(parent[key]))
            case 3 if isinstance(parent, dict):
                parent[str(chance.choice(NASTY))] = parent.pop(key)
            case _:
                parent[key] = copy.deepcopy(chance.choice(NASTY))
    return out[0]


def _nodes(parent: Any):
    for key in range(len(parent)) if isinstance(parent, list) else list(parent):
        yield parent, key
        if isinstance(parent[key], list | dict):
            yield from _nodes(parent[key])
