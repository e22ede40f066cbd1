"""A short program for compute-sanitizer: every kernel, and every way in which softmax cuts its rows, in at most 300 launches.

    compute-sanitizer --tool memcheck --error-exitcode 1 python3 tests/cuda_sanitize.py

Inputs are drawn on the CPU, copied, and results compared there, so that nearly all launches are fastact's own. It exits with 1
if a result is wrong. Under memcheck and initcheck PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives each tensor memory of its own, so that
an access beyond it is seen.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastact
from fastact._registry import along_dim, elementwise
from fastact.channels import references

MOST_LAUNCHES = 300
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]

# (outer, length, inner) and how many launches one call makes at most. Along memory: parts of a warp, a warp, a block of
# several, a cluster, and what is longer than that; each with lengths that vectors divide and that they do not. Then across
# memory.
SHAPES = [
    ((7, 64, 1), 1), ((7, 33, 1), 1), ((33, 3, 1), 1), ((5, 200, 1), 1), ((5, 512, 1), 1), ((3, 2049, 1), 1),
    ((2, 16384, 1), 1), ((2, 32768, 1), 1), ((1, 65537, 1), 1), ((1, 300001, 1), 3),
    ((4, 10, 8), 1), ((3, 21, 65), 1), ((2, 100, 33), 1), ((1, 1000, 40), 1), ((1, 5000, 16), 1), ((1, 70000, 8), 3),
]  # fmt: skip
# The other two dtypes have the same code with other widths, and log_softmax cuts its rows as softmax does.
FEW_SHAPES = [SHAPES[k] for k in (1, 4, 6, 10, 12)]
# Channels whose elements lie apart or together, few and many, that vectors divide and that they do not.
CHANNEL_SHAPES = [(300, 64), (3, 5, 129), (2, 16, 3000)]

generator = torch.Generator("cpu").manual_seed(1)
launches = 0
failures: list[str] = []


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").mul_(3).to(dtype)


def on_gpu(t: Tensor, offset: int = 0) -> Tensor:
    """A copy that begins `offset` elements after an aligned address, and ends where its memory ends."""
    buffer = torch.empty(t.numel() + offset, dtype=t.dtype, device="cpu")
    buffer[:offset] = math.nan if t.is_floating_point() else 255
    buffer[offset:] = t.flatten()
    return buffer.to("cuda")[offset:].view(t.shape)


def compare(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.cpu().double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    if not error <= tolerance:
        failures.append(f"{what}: off by {error:.3g}, allowed {tolerance:.3g}")


def check(what: str, of_device: Callable[..., Any], tensors: list[Tensor], offsets: list[int], count: int) -> None:
    """The op on the GPU beside the op on the CPU. float32 and float64 sums differ in their order only; 16-bit results of size
    below 64, as here, by a step; and bytes, which are indices, not at all.
    """
    global launches
    launches += count
    eps = torch.finfo(tensors[0].dtype).eps * (1 if tensors[0].dtype.itemsize == 2 else 64)
    actual = of_device(*(on_gpu(t, offset) for t, offset in zip(tensors, offsets, strict=True)))
    expected = of_device(*tensors)
    if isinstance(actual, Tensor):
        actual, expected = (actual,), (expected,)
    for a, e in zip(actual, expected, strict=True):
        scale = max(1.0, e.double().abs().max().item())
        compare(what, a, e, scale * eps if e.is_floating_point() else 0)


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
        for row in along_dim.values() if dtype in DTYPES[:2] else [along_dim["softmax"]]:
            all_shapes = row.name == "softmax" and dtype in DTYPES[:2]
            for number, (shape, count) in enumerate(SHAPES if all_shapes else FEW_SHAPES):
                offset = number % 2
                x, dy = draw(shape, dtype), draw(shape, dtype)
                y = row.op(x, 1)
                what = f"{row.name} {dtype} {shape}"
                check(what, lambda x, row=row: row.op(x, 1), [x], [offset], count)
                gradient = lambda dy, y, row=row: row.backward_op(dy, y, 1)  # noqa: E731
                check(f"{what} gradient", gradient, [dy, y], [0, offset], count)


def channel_launches() -> None:
    for dtype in DTYPES[:2]:
        for name, reference in references.items():
            forward, backward = getattr(torch.ops.fastact, name), getattr(torch.ops.fastact, name + "_backward")
            count = len(inspect.signature(reference).parameters) - 1
            for number, shape in enumerate(CHANNEL_SHAPES):
                x, dy = draw(shape, dtype), draw(shape, dtype)
                parameters = [draw((shape[1],), dtype) for _ in range(count)]
                offsets = [number % 2] * (1 + count)
                check(f"{name} {dtype} {shape}", forward, [x, *parameters], offsets, 1)
                # A launch for x and the sums of the blocks, and one for each parameter.
                check(f"{name} {dtype} {shape} gradients", backward, [dy, x, *parameters], [0, *offsets], 1 + count)


def maxout_launches() -> None:
    ops = torch.ops.fastact
    for dtype in DTYPES[:2]:
        for shape, pieces in [((7, 33), 3), ((5, 6, 64), 2), ((5, 6, 33), 3)]:
            what = f"maxout {dtype} {shape}"
            x = draw(shape, dtype)
            check(what, lambda x, pieces=pieces: ops.maxout(x, pieces, 1), [x], [1], 1)
            y, index = ops.maxout(x, pieces, 1)
            dy = draw(tuple(y.shape), dtype)
            gradient = lambda dy, index, pieces=pieces: ops.maxout_backward(dy, index, pieces, 1)  # noqa: E731
            check(f"{what} gradient", gradient, [dy, index], [1, 1], 1)


def look_launches() -> None:
    """What a monitor counts of an output, its rows and two gradients; of all elements, and of a sample."""
    global launches
    for dtype in DTYPES[:2]:
        x = draw((33, 129), dtype)
        for sample in (None, 256):
            counts = []
            for given in (x, on_gpu(x)):
                model = torch.nn.Sequential(fastact.ReLU(), fastact.Softmax(1))
                leaf = given.clone().requires_grad_()
                with fastact.monitor(model, sample=sample) as watch:
                    model(leaf).float().square().sum().backward()
                counts.append([
                    [*map(float, (s.count[0], s.nan[0], s.infinite[0], s.histogram.sum()))]
                    for layer in watch.history().layers for s in (layer.output, layer.gradient_in, layer.gradient_out)
                ])  # fmt: skip
            launches += 7
            expected, actual = map(torch.tensor, counts)
            compare(f"monitor {dtype}, sample {sample}", actual, expected, 0)


def main() -> int:
    if not torch.cuda.is_available() or fastact.build_info()["cuda"] is None:
        print("needs a GPU, and a fastact that was built with CUDA", file=sys.stderr)
        return 2
    elementwise_launches()
    softmax_launches()
    channel_launches()
    maxout_launches()
    look_launches()
    torch.cuda.synchronize()
    if launches > MOST_LAUNCHES:
        failures.append(f"{launches} launches: more than the {MOST_LAUNCHES} that a slow tool can follow")
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{launches} launches at most, {len(failures)} wrong")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
