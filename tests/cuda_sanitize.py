"""A short program for compute-sanitizer: every kernel, and every way in which softmax cuts its rows, in at most 200 launches.

    compute-sanitizer --tool memcheck --error-exitcode 1 python3 tests/cuda_sanitize.py

Inputs are drawn on the CPU, copied, and results compared there, so that nearly all launches are fastact's own. It exits with 1
if a result is wrong. Under memcheck and initcheck PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives each tensor memory of its own, so that
an access beyond it is seen.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import fastact
from fastact._registry import elementwise

MOST_LAUNCHES = 200
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]

# (outer, length, inner) and how many launches one call makes at most. Along memory: parts of a warp, a warp, a block of
# several, a cluster, and what is longer than that; each with lengths that vectors divide and that they do not. Then across
# memory.
SHAPES = [
    ((7, 64, 1), 1), ((7, 33, 1), 1), ((33, 3, 1), 1), ((5, 200, 1), 1), ((5, 512, 1), 1), ((3, 2049, 1), 1),
    ((2, 16384, 1), 1), ((2, 32768, 1), 1), ((1, 65537, 1), 1), ((1, 300001, 1), 3),
    ((4, 10, 8), 1), ((3, 21, 65), 1), ((2, 100, 33), 1), ((1, 1000, 40), 1), ((1, 5000, 16), 1), ((1, 70000, 8), 3),
]  # fmt: skip
# The other two dtypes have the same code with other widths.
FEW_SHAPES = [SHAPES[k] for k in (1, 4, 6, 10, 12)]

generator = torch.Generator("cpu").manual_seed(1)
launches = 0
failures: list[str] = []


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").mul_(3).to(dtype)


def on_gpu(t: Tensor, offset: int = 0) -> Tensor:
    """A copy that begins `offset` elements after an aligned address, and ends where its memory ends."""
    buffer = torch.empty(t.numel() + offset, dtype=t.dtype, device="cpu")
    buffer[:offset] = math.nan
    buffer[offset:] = t.flatten()
    return buffer.to("cuda")[offset:].view(t.shape)


def compare(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.cpu().double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    if not error <= tolerance:
        failures.append(f"{what}: off by {error:.3g}, allowed {tolerance:.3g}")


def check(what: str, of_device: Callable[..., Tensor], tensors: list[Tensor], offsets: list[int], count: int) -> None:
    """The op on the GPU beside the op on the CPU. float32 and float64 sums differ in their order only; 16-bit results of size
    below 64, as here, by a step.
    """
    global launches
    launches += count
    dtype = tensors[0].dtype
    actual = of_device(*(on_gpu(t, offset) for t, offset in zip(tensors, offsets, strict=True)))
    expected = of_device(*tensors)
    scale = max(1.0, expected.double().abs().max().item())
    compare(what, actual, expected, scale * torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 64))


def elementwise_launches() -> None:
    for dtype in DTYPES:
        for number, row in enumerate(elementwise.values()):
            values = tuple(row.parameters.values())
            # By turns aligned, alike misaligned, and each in its own way; with a head, a middle and a tail.
            offsets = [[0, 0], [1, 1], [1, 2]][number % 3]
            x, dy = draw((1003,), dtype), draw((1003,), dtype)
            saved = x if row.saves_input(*values) else row.op(x, *values)
            check(f"{row.name} {dtype}", lambda x, row=row, v=values: row.op(x, *v), [x], offsets[:1], 1)
            gradient = lambda dy, saved, row=row, v=values: row.backward_op(dy, saved, *v)  # noqa: E731
            check(f"{row.name} {dtype} gradient", gradient, [dy, saved], offsets, 1)
        # Nothing but a tail.
        check(f"relu {dtype}, 3 elements", torch.ops.fastact.relu, [draw((3,), dtype)], [1], 1)
    # So many that blocks take a second tile: more than 64 for each of a GPU's multiprocessors.
    n = 64 * torch.cuda.get_device_properties(0).multi_processor_count * 256 * 2 * 2 + 12345
    x = draw((n,), torch.float64)
    check("relu of many elements", torch.ops.fastact.relu, [x], [0], 1)


def softmax_launches() -> None:
    for dtype in DTYPES:
        for number, (shape, count) in enumerate(SHAPES if dtype in DTYPES[:2] else FEW_SHAPES):
            offset = number % 2
            x, dy = draw(shape, dtype), draw(shape, dtype)
            y = torch.ops.fastact.softmax(x, 1)
            what = f"softmax {dtype} {shape}"
            check(what, lambda x: torch.ops.fastact.softmax(x, 1), [x], [offset], count)
            gradient = lambda dy, y: torch.ops.fastact.softmax_backward(dy, y, 1)  # noqa: E731
            check(f"{what} gradient", gradient, [dy, y], [0, offset], count)


def main() -> int:
    if not torch.cuda.is_available() or fastact.build_info()["cuda"] is None:
        print("needs a GPU, and a fastact that was built with CUDA", file=sys.stderr)
        return 2
    elementwise_launches()
    softmax_launches()
    torch.cuda.synchronize()
    if launches > MOST_LAUNCHES:
        failures.append(f"{launches} launches: more than the {MOST_LAUNCHES} that a slow tool can follow")
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{launches} launches at most, {len(failures)} wrong")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
