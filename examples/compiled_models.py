"""A CNN and an MLP under torch.compile, with torch's activations and with fastact's.

    python examples/compiled_models.py [--repeats N]

Dynamo traces fastact's functions as plain torch, so both compile to the same code: what is left between the first two columns
is noise. `kernels` keeps fastact's own kernels in the graph (fastact.compiler.opaque), which then cannot be fused with their
neighbours. Every line is a training step, forward and backward, of a batch: medians over interleaved repetitions, and that of
torch.nn's time over fastact's in the same repetition, with its quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastact

KERNELS = ("relu", "sigmoid", "tanh", "silu", "elu", "log_softmax")  # what is in the models below


def cnn() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(3, 32),
        *block(32, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        nn.AvgPool2d(8),
        nn.Flatten(),
        nn.Linear(256, 10),
        nn.Sigmoid(),
    )


def mlp() -> nn.Module:
    layers: list[nn.Module] = []
    for activation in (nn.Sigmoid, nn.Tanh, nn.SiLU, nn.ELU):
        layers += [nn.Linear(512, 512), activation(), nn.LayerNorm(512)]
    return nn.Sequential(*layers, nn.Linear(512, 100), nn.LogSoftmax(dim=1))


def step(model: Callable[[Tensor], Tensor], x: Tensor) -> None:
    model(x).square().mean().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100)
    repeats = parser.parse_args().repeats
    print(f"{'training step, ms':24}{'torch.nn':>12}{'fastact':>12}{'kernels':>12}{'torch.nn / fastact':>26}")
    for name, make, x in (
        ("CNN, 32 x 3 x 32 x 32", cnn, torch.randn(32, 3, 32, 32)),
        ("MLP, 256 x 512", mlp, torch.randn(256, 512)),
    ):
        ways: list[Callable[[Tensor], Tensor]] = []
        torch._dynamo.reset()
        for way in ("torch.nn", "fastact", "kernels"):
            torch.manual_seed(0)
            model = make()
            if way != "torch.nn":
                fastact.patch(model)
            compiled = torch.compile(model, fullgraph=True)
            with fastact.compiler.opaque(*(KERNELS if way == "kernels" else ())):
                step(compiled, x)
            ways.append(compiled)
        times: list[list[float]] = [[] for _ in ways]
        for turn in range(repeats):
            for way, found in list(zip(ways, times, strict=True))[:: -1 if turn % 2 else 1]:
                start = time.perf_counter()
                step(way, x)
                found.append(1000 * (time.perf_counter() - start))
        medians = [statistics.median(found) for found in times]
        q1, ratio, q3 = statistics.quantiles((a / b for a, b in zip(*times[:2], strict=True)), n=4)
        print(f"{name:24}" + "".join(f"{median:12.2f}" for median in medians) + f"{ratio:10.3f} ({q1:.3f} to {q3:.3f})")


if __name__ == "__main__":
    main()
