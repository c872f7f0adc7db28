"""FLOPs of a compiled program's matrix products, read from its text (`compiled.as_text()`).

XLA's own count (`cost_analysis`) takes the body of a loop once, and layers, micro-batches and
chunks of the head are loops. What is not a product (norms, exponentials) is not counted.
"""

import math
import re

import numpy as np

from bench import program_text


def flops(text: str) -> float:
    """Of one run on one device: dots and convolutions, two a multiplication.

    Raises:
      ValueError: a loop's number of trips is not in the text.
    """
    return program_text.totals(text, _of_line).get("flops", 0.0)


def _of_line(line: program_text.Line) -> dict[str, float]:
    kind = re.search(r" = \w+\[([\d,]*)\]\S* (dot|convolution)\((.*)", line.text)
    if kind is None:
        return {}
    result = _numbers(kind[1])
    lhs, rhs = (line.shapes[name] for name in re.findall(r"%([\w.\-]+)", kind[3])[:2])
    if kind[2] == "dot":
        summed = _numbers(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", kind[3])[1])
        return {"flops": 2.0 * math.prod(result) * math.prod(lhs[d] for d in summed)}
    return {"flops": 2.0 * _of_convolution(kind[3], lhs, rhs, result)}


def _of_convolution(
    text: str, lhs: tuple[int, ...], rhs: tuple[int, ...], result: tuple[int, ...]
) -> int:
    """Multiplications; on TPU every product is a convolution, its batch a dimension of space."""
    of_lhs, of_rhs, of_result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text).groups()
    spatial = sorted(set(of_result) - {"b", "f"})
    window = re.search(r"window=\{([^}]*)\}", text)
    window = dict(part.split("=") for part in window[1].split()) if window else {}

    def of(key: str, default: str) -> list[str]:
        return window[key].split("x") if key in window else [default] * len(spatial)

    found = result[of_result.index("b")] * result[of_result.index("f")] * rhs[of_rhs.index("i")]
    parts = zip(
        spatial, of("size", "1"), of("stride", "1"), of("pad", "0_0"), of("lhs_dilate", "1"),
        of("rhs_dilate", "1"), strict=True,
    )  # fmt: skip
    for dim, size, stride, pad, lhs_dilate, rhs_dilate in parts:
        out_O = np.arange(result[of_result.index(dim)])[:, None] * int(stride)
        at_OK = out_O + np.arange(int(size)) * int(rhs_dilate) - int(pad.split("_")[0])
        n, apart = lhs[of_lhs.index(dim)], int(lhs_dilate)
        # Products with padding and with the zeros between dilated elements are left out.
        found *= int(((at_OK >= 0) & (at_OK <= (n - 1) * apart) & (at_OK % apart == 0)).sum())
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)
