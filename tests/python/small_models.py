"""Small models to be converted, of which everything can be counted, and what is compared of them."""

import torch
from torch import nn

D = 16


class RMSNorm(nn.Module):
    """As transformers has it: in float32, rounded, times the weight."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-6

    def forward(self, x):
        y = x.to(torch.float32) if x.dtype != torch.float64 else x
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * y.to(x.dtype)


class PlusOne(RMSNorm):
    """As Gemma has it: times 1 + weight."""

    def __init__(self, width):
        super().__init__(width)
        nn.init.zeros_(self.weight)

    def forward(self, x):
        y = x if x.dtype == torch.float64 else x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (y * (1.0 + self.weight.to(y.dtype))).to(x.dtype)


NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "composite": RMSNorm, "plus": PlusOne}


def randomize(model, *, ill=False):
    """Random weights, and of norms some channels that cannot be inverted."""
    for module in model.modules():
        if isinstance(module, tuple(NORMS.values())):
            with torch.no_grad():
                module.weight.add_(0.2 * torch.randn_like(module.weight))
                if getattr(module, "bias", None) is not None:
                    module.bias.add_(0.2 * torch.randn_like(module.bias))
                if ill:
                    module.weight[3] = -1 if isinstance(module, PlusOne) else 0
                    module.weight[5] -= 1e-20
                    if getattr(module, "bias", None) is not None:
                        module.bias[7] = 300
    return model


class Block(nn.Module):
    """A pre-norm block whose two linear layers take one norm's output."""

    def __init__(self, norm=nn.LayerNorm, activation=nn.GELU):
        super().__init__()
        self.norm, self.activation = norm(D), activation()
        self.up, self.gate, self.down = nn.Linear(D, 4 * D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x):
        z = self.norm(x)
        return x + self.down(self.activation(self.up(z)) * self.gate(z))


class PostNorm(nn.Module):
    """A post-norm block: the norm's output goes to linear layers and to the next residual sum."""

    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.norm, self.q, self.k, self.out = norm(D), nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.position = nn.Parameter(torch.randn(D))

    def forward(self, x):
        z = self.norm(x + self.position)  # float32 under autocast, as a residual stream is
        return z + self.out(torch.tanh(self.q(z)) * self.k(z))


def make(block=Block, *, ill=False, dtype=torch.float32, depth=2, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(D, D), *(block(**options) for _ in range(depth)), nn.Linear(D, 3))
    return randomize(model, ill=ill).to(dtype)


def batch(dtype=torch.float32):
    return torch.randn(4, 5, D, generator=torch.Generator().manual_seed(2)).to(dtype)


def results(model, x):
    """Output and gradients, of parameters and input."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return y.detach(), grads | {"input": x.grad}


def distance(a, b):
    """Of results, relative to the norm of all gradients together: single ones may vanish."""
    scale = torch.stack([g.double().norm() for g in b.values()]).norm()
    assert a.keys() == b.keys()
    return max(((a[name].double() - b[name].double()).norm() / scale).item() for name in b)


def actions(report):
    return {d.name: d.action for d in report.decisions}


def classes(model):
    return [type(m) for m in model.modules()]


def ill_norm():
    """One that cannot be inverted."""
    norm = nn.LayerNorm(D)
    with torch.no_grad():
        norm.weight[0] = 0
        norm.bias.normal_()
    return norm
