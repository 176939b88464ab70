"""Helpers of the tests of lomem.memory."""

import lomem
import torch
from lomem import memory
from torch import nn


class Tiny(nn.Module):
    """Two linear layers with countable bytes: 212 float32 parameters."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


PARAMETERS = (8 * 16 + 16 + 16 * 4 + 4) * 4


H = 4 * 16 * 4  # between the layers


def tiny_input(**kwargs):
    return torch.randn(4, 8, **kwargs)


class OnModule(nn.Module):
    def forward(self, x):
        self.kept = x * 2
        return x + 1


class NormThen(nn.Module):
    def __init__(self, norm, then):
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.norm = norm
        self.then = then

    def forward(self, x):
        return self.then(self.norm(self.stem(x)))


def reports():
    model = NormThen(lomem.nn.MSLayerNorm(16), OnModule())
    x = torch.randn(4, 16)
    return [memory.profile(model, x), memory.step_peak(model, x, torch.optim.AdamW(model.parameters()))]
