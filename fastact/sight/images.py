"""The kernels of convolutions beside their gradients, as images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

Array = NDArray[np.float64]

MOST = 64  # kernels of a layer that are shown, and rows and columns of a 1x1 convolution's matrix
ACROSS = 16  # kernels side by side
BETWEEN = "#8C8C8C"  # what separates them where white is 0, and stands for NaN


def gradient_images(model: nn.Module, path: str | PathLike[str]) -> None:
    """Draws the kernels of every convolution of `model` that has a gradient, and beside them the gradients, into one file.

    A kernel with 3 input channels and more than one pixel is a colour image: 0 is middle grey, and plus or minus the largest
    magnitude the brightest or the darkest. All others are drawn from blue (negative) over white (0) to red, one image for a
    pair of an output and an input channel, one row for an output channel; a 1x1 convolution is its matrix of output by input
    channels; depth slices of a 3-dimensional kernel stand side by side. Of a layer, 64 kernels at most. The scale is
    symmetric around 0 and that of the layer, once for its kernels and once for its gradients; written beside them are that
    scale and the RMS of either, over all its kernels.

    Call it after `loss.backward()`. `path`: its ending (.png, .pdf, .svg) names the type. Raises `ValueError` where no
    convolution has a gradient. Needs matplotlib: `pip install 'fastact[sight]'`.
    """
    from fastact.sight import plot

    pairs = [Pair(name, *found) for name, module in model.named_modules() if (found := _weight_and_gradient(module))]
    if not pairs:
        raise ValueError(_nothing(model))
    heights = [max(pair.mosaics[0].shape[0] / pair.mosaics[0].shape[1] * 4.6, 0.55) + 0.62 for pair in pairs]
    figure = plot.canvas(12, sum(heights) + 0.5)
    figure.suptitle("Kernels of the convolutions, and their gradients\n", fontsize=13, color=plot.INK)
    panels = figure.subplots(len(pairs), 2, squeeze=False, height_ratios=heights)
    for pair, (left, right) in zip(pairs, panels, strict=True):
        for axes, tensor, mosaic, what in zip((left, right), pair.tensors, pair.mosaics, ("kernels", "gradients"), strict=True):
            limit = pair.limit(tensor)
            axes.imshow(mosaic, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            bad = int((~np.isfinite(tensor)).sum())
            numbers = f"RMS {_rms(tensor):.2e}, scale ±{limit:.2e}" + (f", {bad} not finite" if bad else "")
            axes.set_xlabel(f"{what}: {numbers}", fontsize=8.5, color=plot.DEAD if bad else plot.INK)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_facecolor(BETWEEN)
            for spine in axes.spines.values():
                spine.set_visible(False)
        left.set_title(pair.title(), fontsize=9.5, color=plot.INK, loc="left", **plot.NAMED)
    # A file of at most 60,000 pixels height, which is as high as matplotlib draws.
    figure.savefig(path, dpi=min(150, 60_000 / sum(heights)), bbox_inches="tight", pad_inches=0.2)


def _weight_and_gradient(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    weight = getattr(module, "weight", None)
    # Where a parametrization computes the weight it is no leaf, and has no gradient to look at.
    if not isinstance(module, _ConvNd) or not isinstance(weight, Tensor) or not weight.is_leaf or weight.grad is None:
        return None
    if isinstance(module, nn.modules.conv._ConvTransposeNd):  # [in, out, ...]
        return weight.detach().transpose(0, 1), weight.grad.detach().transpose(0, 1)
    return weight.detach(), weight.grad.detach()


def _nothing(model: nn.Module) -> str:
    convolutions = [name or type(m).__name__ for name, m in model.named_modules() if isinstance(m, _ConvNd)]
    if not convolutions:
        return f"model has no convolution (nn.Conv1d, nn.Conv2d ...): {type(model).__name__}"
    first = ", ".join(convolutions[:5]) + (" ..." if len(convolutions) > 5 else "")
    return f"no convolution of model has a gradient ({first}): call gradient_images after loss.backward(), before zero_grad()"


@dataclass
class Pair:
    """A convolution's kernels and their gradients, both [out, in, ...]."""

    name: str
    weight: Tensor
    gradient: Tensor

    def __post_init__(self) -> None:
        self.tensors = [t.to("cpu", torch.float64).numpy() for t in (self.weight, self.gradient)]
        self.mosaics = [self._mosaic(t) for t in self.tensors]

    def title(self) -> str:
        shape = " x ".join(map(str, self.weight.shape))
        return f"{self.name or 'model'}   [{shape}]" + (f", {self.shown} shown" if self.shown else "")

    @staticmethod
    def limit(tensor: Array) -> float:
        """The largest finite magnitude."""
        finite = np.abs(tensor[np.isfinite(tensor)])
        return float(finite.max(initial=0)) or 1.0

    def _mosaic(self, tensor: Array) -> Array:
        out, into, *size = tensor.shape
        self.shown = ""
        if math.prod(size) == 1:
            if out > MOST or into > MOST:
                self.shown = f"the first {min(out, MOST)} x {min(into, MOST)}"
            return tensor.reshape(out, into)[:MOST, :MOST]
        if into == 3:
            if out > MOST:
                self.shown = f"the first {MOST}"
            pixels = np.clip(np.moveaxis(tensor[:MOST], 1, -1) / (2 * self.limit(tensor)) + 0.5, 0, 1)
            return _grid([_image(k) for k in np.nan_to_num(pixels)], min(ACROSS, len(pixels)), 1.0)
        across = min(into, ACROSS)
        down = min(out, MOST // across)
        if (down, across) != (out, into):
            self.shown = f"{down} output x {across} input channels"
        kernels = [_image(k) for k in tensor[:down, :across].reshape(-1, *size, 1)]
        # With one input channel a row would hold one kernel.
        return _grid(kernels, across if into > 1 else min(ACROSS, len(kernels)), np.nan)[..., 0]


def _image(kernel: Array) -> Array:
    """[height, width, colours] of a kernel [..., colours]: of one dimension a row; of three, slices of depth side by side."""
    *size, colours = kernel.shape
    height, width = (1, *size)[-2:]
    return kernel.reshape(-1, height, width, colours).swapaxes(0, 1).reshape(height, -1, colours)


def _grid(images: list[Array], across: int, between: float) -> Array:
    """Images in rows, a pixel apart."""
    height, width, colours = images[0].shape
    down = -(-len(images) // across)
    grid = np.full((down * (height + 1) - 1, across * (width + 1) - 1, colours), between)
    for i, image in enumerate(images):
        y, x = i // across * (height + 1), i % across * (width + 1)
        grid[y : y + height, x : x + width] = image
    return grid


def _rms(tensor: Any) -> float:
    finite = tensor[np.isfinite(tensor)]
    return float(np.sqrt(np.mean(finite * finite))) if finite.size else math.nan
