"""Derives the coefficients of csrc/lane.h and csrc/cpu: minimax fits by the Remez exchange algorithm.

    python tools/coefficients.py          prints every table as it stands there

Each function is written as `head(x) + x^k P(u)`, where the head is exact, and P is the polynomial of the given
degree that minimises the largest relative error of the whole function over the interval. The fit is made in 40 digits and its
coefficients are rounded to the type once; `error` is the largest relative error after the rounding, evaluated exactly,
so it leaves out only the rounding of the evaluation itself.

Needs mpmath (torch brings it, through sympy).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

import mpmath as mp

mp.mp.dps = 40
LN2 = mp.log(2)


@dataclass(frozen=True)
class Fit:
    """One table: `target(u)` is what P(u) approximates, `weight(u)` turns its error into the function's relative error."""

    name: str
    of: str
    target: Callable[[mp.mpf], mp.mpf]
    weight: Callable[[mp.mpf], mp.mpf]
    low: mp.mpf
    high: mp.mpf
    degree: int
    ctype: str


def series(f: Callable[[mp.mpf], mp.mpf], taylor: list[mp.mpf], u: mp.mpf) -> mp.mpf:
    """f(u), through its Taylor polynomial where the closed form cancels."""
    return mp.polyval(taylor[::-1], u) if abs(u) < mp.mpf("1e-3") else f(u)


EXPM1 = [1 / mp.factorial(k + 2) for k in range(14)]
TANH = [c for c in mp.taylor(mp.tanh, 0, 31)[3::2]]
ATANH = [mp.mpf(2) / (2 * k + 3) for k in range(14)]


def expm1_tail(r: mp.mpf) -> mp.mpf:
    return series(lambda u: (mp.expm1(u) - u) / u**2, EXPM1, r)


def exp2_tail(f: mp.mpf) -> mp.mpf:
    return mp.expm1(f * LN2) / f if f else LN2


def tanh_tail(z: mp.mpf) -> mp.mpf:
    return series(lambda u: (mp.tanh(mp.sqrt(u)) / mp.sqrt(u) - 1) / u, TANH, z)


def tanh_weight(z: mp.mpf) -> mp.mpf:
    return mp.mpf(1) if z == 0 else z / (mp.tanh(mp.sqrt(z)) / mp.sqrt(z))


def atanh_tail(z: mp.mpf) -> mp.mpf:
    return series(lambda u: 2 * (mp.atanh(mp.sqrt(u)) / mp.sqrt(u) - 1) / u, ATANH, z)


def atanh_weight(z: mp.mpf) -> mp.mpf:
    return mp.mpf(0) if z == 0 else z / (2 * mp.atanh(mp.sqrt(z)) / mp.sqrt(z))


HALF = LN2 / 2 * mp.mpf("1.0005")  # rounding x / ln 2 may miss the nearest integer by a little
ATANH_END = mp.mpf("0.2") ** 2
FITS = [
    Fit("exp2_tail", "(2^f - 1) / f of f", exp2_tail, lambda f: f / 2**f, -HALF / LN2, HALF / LN2, 4, "float"),
    # exp: relative to exp(r) itself, because the 1 is added before the result is scaled. (double uses expm1's table.)
    Fit("exp_tail<float>", "(e^r - 1 - r) / r^2 of r", expm1_tail, lambda r: r**2 / mp.exp(r), -HALF, HALF, 4, "float"),
    # expm1: relative to expm1(r), which is stricter, because nothing is added where |x| is small.
    Fit(
        "expm1_tail<float>",
        "(e^r - 1 - r) / r^2 of r",
        expm1_tail,
        lambda r: r**2 / mp.expm1(r) if r else mp.mpf(0),
        -HALF,
        HALF,
        5,
        "float",
    ),
    Fit(
        "expm1_tail<double>",
        "(e^r - 1 - r) / r^2 of r",
        expm1_tail,
        lambda r: r**2 / mp.expm1(r) if r else mp.mpf(0),
        -HALF,
        HALF,
        11,
        "double",
    ),
    Fit("tanh_tail<float>", "(tanh x - x) / x^3 of x^2", tanh_tail, tanh_weight, mp.mpf(0), mp.mpf("0.625") ** 2, 5, "float"),
    Fit(
        "tanh_tail<double>", "(tanh x - x) / x^3 of x^2", tanh_tail, tanh_weight, mp.mpf(0), mp.mpf("0.625") ** 2, 11, "double"
    ),
    # atanh, in logarithms: log1p on [-1/4, 1/2] takes it to 0.2, log between the roots of 1/2 and 2 to 0.1716.
    Fit("atanh_tail<float>", "2 (atanh s - s) / s^3 of s^2", atanh_tail, atanh_weight, mp.mpf(0), ATANH_END, 2, "float"),
    Fit("atanh_tail<double>", "2 (atanh s - s) / s^3 of s^2", atanh_tail, atanh_weight, mp.mpf(0), ATANH_END, 8, "double"),
]


def rounded(value: mp.mpf, ctype: str) -> mp.mpf:
    return mp.mpf(struct.unpack("f", struct.pack("f", float(value)))[0] if ctype == "float" else float(value))


def literal(value: mp.mpf, ctype: str) -> str:
    return re.sub(r"\.?0*p", "p", float(value).hex()) + ("f" if ctype == "float" else "")


def remez(fit: Fit) -> list[mp.mpf]:
    """Coefficients, lowest first: exchange until the error alternates with one height."""
    n = fit.degree + 2
    middle, half = (fit.low + fit.high) / 2, (fit.high - fit.low) / 2
    points = [middle + half * mp.cos(mp.pi * (2 * i + 1) / (2 * n)) for i in range(n)][::-1]
    coefficients: list[mp.mpf] = []
    for _ in range(12):
        rows = mp.matrix(n, n)
        values = mp.matrix(n, 1)
        for i, u in enumerate(points):
            for k in range(fit.degree + 1):
                rows[i, k] = u**k
            weight = fit.weight(u)
            rows[i, fit.degree + 1] = (-1) ** i / (weight if abs(weight) > mp.mpf("1e-30") else mp.mpf("1e-30"))
            values[i] = fit.target(u)
        solution = mp.lu_solve(rows, values)
        coefficients = [solution[k] for k in range(fit.degree + 1)]

        def error(u: mp.mpf, c: list[mp.mpf] = coefficients) -> mp.mpf:
            return (mp.polyval(c[::-1], u) - fit.target(u)) * fit.weight(u)

        grid = [fit.low + (fit.high - fit.low) * i / 600 for i in range(601)]
        heights = [error(u) for u in grid]
        peaks: list[tuple[mp.mpf, mp.mpf]] = []
        for u, height in zip(grid, heights, strict=True):
            if peaks and (height > 0) == (peaks[-1][1] > 0):
                if abs(height) > abs(peaks[-1][1]):
                    peaks[-1] = (u, height)
            else:
                peaks.append((u, height))
        while len(peaks) > n:
            peaks.pop(0 if abs(peaks[0][1]) < abs(peaks[-1][1]) else -1)
        if len(peaks) < n:
            break
        points = [u for u, _ in peaks]
    return coefficients


# The pieces of csrc/cpu/tanh_table.h: 32 intervals of a + SHIFT, eight to a power of two, counted by the bits of that float.
TANH_SHIFT, TANH_PIECES, TANH_DEGREE = 0.625, 32, 4


def tanh_pieces() -> list[list[mp.mpf]]:
    """(m, c0, ..., c4) in the order of the index, where tanh a = c0 + c1 (a - m) + ... + c4 (a - m)^4.

    m lies where tanh m is a float but for a hundredth of a rounding, so that c0 is as good as exact. In the first piece, which
    starts at 0, m = c0 = 0 and c1 = 1.
    """
    pieces: list[list[mp.mpf]] = [[]] * TANH_PIECES
    first = float_bits(TANH_SHIFT) >> 20
    for code in range(first, first + TANH_PIECES):
        low, high = (mp.mpf(bits_float(c << 20)) - TANH_SHIFT for c in (code, code + 1))
        exact = code == first
        m = mp.mpf(0) if exact else lucky_middle(low, high)
        known = 2 if exact else 1  # terms that are not fitted

        def target(r: mp.mpf, m: mp.mpf = m, exact: bool = exact) -> mp.mpf:
            if exact:
                return r * tanh_tail(r**2)
            return (mp.tanh(m + r) - mp.tanh(m)) / r if abs(r) > mp.mpf("1e-15") else 1 - mp.tanh(m) ** 2

        def weight(r: mp.mpf, m: mp.mpf = m, known: int = known) -> mp.mpf:
            return r**known / mp.tanh(m + r) if m + r else mp.mpf(0)

        # The sum a + SHIFT is rounded: an argument may fall into the next piece.
        slack = mp.mpf(2) ** -20
        fit = Fit("", "", target, weight, low - m - (0 if exact else slack), high - m + slack, TANH_DEGREE - known, "float")
        fitted = [rounded(c, "float") for c in remez(fit)]
        pieces[code % TANH_PIECES] = [m, mp.tanh(m) if not exact else mp.mpf(0), *[mp.mpf(1)] * exact, *fitted]
    return pieces


def lucky_middle(low: mp.mpf, high: mp.mpf) -> mp.mpf:
    """Of the floats beside the middle, the first that will do."""
    for j in range(10_000):
        m = rounded((low + high) / 2 + (high - low) * (-1) ** j * j / 20_000, "float")
        if abs(mp.tanh(m) - rounded(mp.tanh(m), "float")) < mp.tanh(m) * mp.mpf(2) ** -31:
            return m
    raise AssertionError(f"no number from {low} to {high} will do")


def float_bits(value: float) -> int:
    return int(struct.unpack("I", struct.pack("f", value))[0])


def bits_float(bits: int) -> float:
    return float(struct.unpack("f", struct.pack("I", bits))[0])


def worst(fit: Fit, coefficients: list[mp.mpf]) -> mp.mpf:
    grid = [fit.low + (fit.high - fit.low) * i / 1000 for i in range(1001)]
    return max(abs((mp.polyval(coefficients[::-1], u) - fit.target(u)) * fit.weight(u)) for u in grid)


def main() -> None:
    for fit in FITS:
        coefficients = [rounded(c, fit.ctype) for c in remez(fit)]
        error = mp.log(worst(fit, coefficients), 2)
        print(f"// {fit.name}: {fit.of}, degree {fit.degree}, relative error 2^{float(error):.1f}")
        print(", ".join(literal(c, fit.ctype) for c in coefficients))
    for k, row in enumerate(zip(*tanh_pieces(), strict=True)):
        print(f"// tanh_table: {'middle' if k == 0 else f'coefficient {k - 1}'}")
        print(", ".join(literal(rounded(value, "float"), "float") for value in row))
    for ctype, bits in (("float", 15), ("double", 38)):
        # The high part keeps so few bits that n * high is exact for every n of the range.
        high = mp.floor(LN2 * 2**bits + mp.mpf("0.5")) / 2**bits
        low = rounded(LN2 - high, ctype)
        print(f"// ln2<{ctype}>: high, low\n{literal(high, ctype)}, {literal(low, ctype)}")


if __name__ == "__main__":
    main()
