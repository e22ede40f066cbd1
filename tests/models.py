"""Small models of the kinds that people have, with known numbers of activation calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """As in torchvision's ResNet: one in-place ReLU, called twice. 2 calls of modules."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    """5 calls of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layers = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 16, 2))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """2 calls of modules."""
    first = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1, inplace=True)]
    return nn.Sequential(*first, nn.Conv2d(outputs, outputs, 3, padding=1), nn.ELU())


class UNet(nn.Module):
    """One level; classes by a softmax over channels. 7 calls of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom, self.up = double_conv(2, 8), double_conv(8, 16), double_conv(16, 8)
        self.pool = nn.MaxPool2d(2)
        self.upsample = nn.ConvTranspose2d(16, 8, 2, 2)
        self.head = nn.Sequential(nn.Conv2d(8, 5, 1), nn.Softmax(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        y = self.upsample(self.bottom(self.pool(skip)))
        return self.head(self.up(torch.cat([skip, y], 1)))


class GatedAttention(nn.Module):
    """Attention by hand, whose output passes a gate. 2 calls of functions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.gate, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = F.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2) * torch.sigmoid(self.gate(x)))


class Transformer(nn.Module):
    """torch's encoder, whose ReLU is a function in one layer and a module in the other. 1 call of a module, 3 of functions."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation=activation, batch_first=True)
            for activation in (F.relu, nn.ReLU())
        ]
        self.encoder = nn.TransformerEncoder(layers[0], 1, enable_nested_tensor=False)
        self.encoder.layers.append(layers[1])
        self.attention = GatedAttention(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.encoder(x))


class Recurrent(nn.Module):
    """A GRU cell by hand, which calls the methods of tensors, over 3 steps, then a perceptron whose layers share their
    activation. 3 calls of modules (of one module), 9 of functions."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.candidate = nn.Linear(14, 16), nn.Linear(14, 8)
        self.activation = nn.Tanh()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), self.activation) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 8)
        for step in x.unbind(1):
            reset, update = self.gates(torch.cat([step, h], 1)).chunk(2, 1)
            new = self.candidate(torch.cat([step, reset.sigmoid() * h], 1)).tanh()
            h = torch.lerp(new, h, torch.sigmoid(update))
        for layer in self.layers:
            h = layer(h)
        return h


@dataclass(frozen=True)
class Model:
    """A model and what is known of it: the shape of its input, and how often a forward calls activations."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    module_calls: int
    function_calls: int

    def build(self, generator: torch.Generator) -> nn.Module:
        """The model in float64, with parameters from the generator."""
        model = self.make().double()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter, generator=generator)
            else:
                nn.init.uniform_(parameter, 0.1, 1.0, generator=generator)
        return model


MODELS = [
    Model(ResNet, (4, 3, 16, 16), 5, 0),
    Model(UNet, (2, 2, 8, 8), 7, 0),
    Model(Transformer, (3, 6, 16), 1, 3),
    Model(Recurrent, (5, 3, 6), 3, 9),
]
