"""A model that is converted in every way, and how ``data/converted_0.x.pt`` was made of it.

That file holds what the version before ``lomem.convert`` had a ``criterion`` pickled. It was written once, with that
version installed, by ``python tests/python/pickled_model.py``, and is never to be written again.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 8
PATH = Path(__file__).with_name("data") / "converted_0.x.pt"

#: What lomem.convert makes of each module under bfloat16 autocast.
ACTIONS = {
    "pre.norm": "inverted",
    "pre.gelu": "2bit",
    "post.norm": "two outputs",
    "ill.norm": "normalized",
    "ill.silu": "2bit",
    "quick": "2bit",
    "call": "2bit",
}


class Pre(nn.Module):
    """The norm's output goes to a linear layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gelu = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU()
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.gelu(self.up(self.norm(x))))


class Post(nn.Module):
    """The norm's output goes to two linear layers and to a residual sum, where its full precision matters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.position = nn.Parameter(torch.linspace(-1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x + self.position)
        return z + torch.tanh(self.a(z)) * self.b(z)


class Ill(nn.Module):
    """A weight of the norm is 0, so that its output does not tell its normalized input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.silu = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU()
        with torch.no_grad():
            self.norm.weight[2] = 0
            self.norm.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.silu(self.up(self.norm(x)))


class Quick(nn.Module):
    """GELU by way of a sigmoid, as transformers writes it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Call(nn.Module):
    """GELU as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x), approximate="tanh")


class Model(nn.Module):
    """All of them, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.pre, self.post, self.ill = Pre(), Post(), Ill()
        self.linear, self.quick, self.call = nn.Linear(WIDTH, WIDTH), Quick(), Call()

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.quick(self.linear(self.ill(self.post(self.pre(x))))))


def results(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients under bfloat16 autocast."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _write() -> None:
    import lomem

    # Under the name by which tests import this module.
    import pickled_model

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, x = pickled_model.Model(), torch.randn(4, 5, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        report = lomem.convert(model, x)
    assert {d.name: str(d.action) for d in report.decisions} == ACTIONS
    output, gradients = results(model, x)
    model.zero_grad()
    contents = {"version": lomem.__version__, "model": model, "input": x, "output": output, "gradients": gradients}
    PATH.parent.mkdir(exist_ok=True)
    torch.save(contents, PATH)


if __name__ == "__main__":
    _write()
