"""Warnings of lomem.convert about gradients, and whether what they advise helps."""

import dataclasses
import json
import re
import warnings

import lomem
import pytest
import torch
from fidelity_helpers import (
    MODELS,
    SETTINGS,
    WIDTH,
    built,
    conv,
    gpt2,
    seeded,
    vit,
    x_of,
)
from lomem.conversion import GradientFidelity, advice
from lomem.conversion.forms import ActivationForm
from lomem.conversion.kinds import Action, Criterion, Function, Kind, Wishes
from lomem.conversion.ledger import Candidate
from small_models import classes
from torch import nn

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::lomem.GradientWarning"),
]


# --- The warning ------------------------------------------------------------------------------------------------------


def warned(model, batch, **options):
    """The report, and the message of the warning if there is one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", lomem.GradientWarning)
        report = lomem.convert(model, batch, **options)
    caught = [w for w in caught if issubclass(w.category, lomem.GradientWarning)]
    assert len(caught) <= 1
    if caught:
        assert caught[0].filename == __file__
        message = str(caught[0].message)
        assert message.removeprefix("lomem.convert: ") in report.notes
        return report, message
    return report, None


MESSAGE = re.compile(
    r"lomem\.convert: (the|one draw of the) gradient on the example batch has a cosine of (-?[\d.]+) to the exact one, "
    r"furthest off in (.+?)(?:, and (\d+) more below (0\.9|0\.95))?: pass (.+) for a closer one"
)
STEPS = {"rounding": "nearest"}


def advised(message):
    """The options that a message advises."""
    options = re.findall(r'(\w+)=("?)(\w+)\2', MESSAGE.fullmatch(message)[6])
    return {name: value if quote else int(value) for name, quote, value in options}


def deep_mlp(activation, depth=24):
    layers = [m for _ in range(depth) for m in (nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), activation())]
    return nn.Sequential(*layers), (x_of(32, WIDTH),)


class InvertedResidual(nn.Module):
    """As in EfficientNet: 1x1, depthwise and 1x1 convolutions with BatchNorm, and a squeeze with SiLU."""

    def __init__(self, width):
        super().__init__()
        inner = 4 * width
        self.expand = nn.Sequential(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.SiLU())
        self.deep = nn.Sequential(
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.SiLU()
        )
        self.reduce, self.widen, self.act = nn.Conv2d(inner, 4, 1), nn.Conv2d(4, inner, 1), nn.SiLU()
        self.project = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.deep(self.expand(x))
        gate = self.widen(self.act(self.reduce(y.mean((2, 3), keepdim=True))))
        return x + self.project(y * gate.sigmoid())


def efficient(depth=12):
    stem = [nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU()]
    return nn.Sequential(*stem, *(InvertedResidual(8) for _ in range(depth))), (x_of(4, 3, 16, 16),)


DESERVING = {
    "conv": (lambda: conv(10), STEPS | {"activations": "2bit"}),
    "deep conv": (lambda: conv(30), STEPS | {"activations": "2bit"}),
    "deep conv, 1 bit": (lambda: conv(20), STEPS | {"activations": "1bit"}),
    "deep conv, 1 bit drawn": (lambda: conv(20), {"activations": "1bit"}),
    "deep conv, 2 bits drawn": (lambda: conv(60), {"activations": "2bit"}),
    "deep conv, paper": (lambda: conv(10), {"criterion": "paper"}),
    "shallow conv, paper": (lambda: conv(1), {"criterion": "paper"}),
    "very deep conv, paper": (lambda: conv(40), {"criterion": "paper"}),
    "deep conv, primitive": (lambda: conv(30), {"criterion": "primitive", "activations": "2bit"}),
    "deep conv, primitive in 3 bits": (lambda: conv(40), {"criterion": "primitive", "activations": "3bit"}),
    "deep conv, bits=2": (lambda: conv(30), STEPS | {"bits": 2}),
    "deep conv, bits=2 drawn": (lambda: conv(60), {"bits": 2}),
    "deep conv, bits=2, paper": (lambda: conv(10), {"bits": 2, "criterion": "paper"}),
    "GELU": (lambda: conv(30, activation=nn.GELU), STEPS | {"activations": "2bit"}),
    "MLP": (lambda: deep_mlp(nn.SiLU), STEPS | {"activations": "2bit", "pairs": "keep"}),
    "MLP of GELU, paper": (lambda: deep_mlp(nn.GELU, 10), {"pairs": "keep", "criterion": "paper"}),
    "MLP in 4 bits": (lambda: deep_mlp(nn.GELU), {"bits": 4}),
    "MLP in groups of 4 bits": (lambda: deep_mlp(nn.GELU), {"pairs": "4bit"}),
    "MLP in groups of 4 bits, norms too": (lambda: deep_mlp(nn.GELU), {"pairs": "4bit", "norms": "4bit"}),
    "EfficientNet, 1 bit": (efficient, STEPS | {"activations": "1bit"}),
    "EfficientNet, 1 bit drawn": (efficient, {"activations": "1bit"}),
    "EfficientNet, paper": (efficient, {"criterion": "paper"}),
    "ViT, paper": (vit, {"pairs": "keep", "criterion": "paper"}),
    "GPT-2, paper": (gpt2, {"pairs": "keep", "criterion": "paper"}),
}


@pytest.mark.parametrize("name", DESERVING)
def test_the_advised_setting_gives_no_warning(name):
    make, options = DESERVING[name]
    model, batch = seeded(make)
    report, message = warned(model, batch, **options)
    assert message is not None, report.gradient
    which, cosine, worst, more, least, _ = MESSAGE.fullmatch(message).groups()
    assert float(cosine) == pytest.approx(report.gradient.cosine, abs=6e-4)
    # Noise averages out, so more of it is allowed.
    codes = any(d.action.code_bits for d in report.converted)
    drawn = codes and options.get("rounding") != "nearest" and "criterion" not in options
    assert which == ("one draw of the" if drawn else "the")
    limit = 0.9 if drawn else 0.95
    assert report.gradient.cosine < limit
    below = sorted((layer.cosine, name) for name, layer in report.layers.items() if layer.share >= 1e-3)
    assert worst == ", ".join(f"{name} ({cosine:.3f})" for cosine, name in below[:3])
    assert int(more or 0) == sum(cosine < limit for cosine, _ in below[3:])
    assert float(least or limit) == limit
    other, _ = seeded(make)
    better, again = warned(other, batch, **(options | advised(message)))
    assert again is None
    assert better.gradient is None or better.gradient.cosine >= limit


def test_layers_whose_gradient_is_rounding_noise_are_not_named():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(6, 1, 1))

        def forward(self, x):
            return x + self.shift

    model, batch = seeded(lambda: conv(20))
    for i in range(0, 80, 4):
        model.insert(i + 1, Shifted())
    report, message = warned(model, batch, activations="2bit", rounding="nearest")
    noise = [name for name, layer in report.layers.items() if layer.share < 1e-3]
    assert noise == [str(i) for i in range(1, 80, 4)]
    assert min(report.layers, key=lambda name: report.layers[name].cosine) in noise
    assert not set(re.findall(r"(\d+) \(", MESSAGE.fullmatch(message)[3])) & set(noise)
    whole = sum(layer.share**2 for layer in report.layers.values())
    assert whole == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("setting", ["default", "8", "4"])
def test_no_warning_without_a_reason(name, setting):
    model, batch = built(name)
    report, message = warned(model, batch, **SETTINGS[setting])
    assert message is None
    assert report.gradient is None or report.gradient.cosine >= 0.95
    assert not report.notes


def test_a_warning_that_is_an_error_leaves_the_model_unconverted():
    model, batch = conv(20)
    before = classes(model)
    with pytest.raises(lomem.GradientWarning):
        lomem.convert(model, batch, activations="1bit")
    assert classes(model) == before


def test_a_gradient_that_is_not_finite_is_warned_of(monkeypatch):
    right = lomem.functional.silu

    def wrong(x, **options):
        y = right(x, **options)
        y.register_hook(lambda grad: grad * torch.nan)
        return y

    monkeypatch.setattr(lomem.functional, "silu", wrong)
    model = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6), nn.SiLU())
    x = x_of(2, 6, 4, 4)
    with pytest.warns(lomem.GradientWarning, match="is not finite, but was before the conversion: lomem.restore"):
        report = lomem.convert(model, x)
    assert report.gradient is None
    json.loads(report.to_json())


# --- The advice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "criterion", "errors"),
    [
        ("gelu", "derivative", (0.320, 0.141, 0.086, 0.042, 0.003)),
        ("gelu", "primitive", (0.320, 0.357, 0.112, 0.054, 0.004)),
        ("silu", "derivative", (0.421, 0.148, 0.103, 0.049, 0.003)),
        ("silu", "primitive", (0.421, 0.471, 0.184, 0.085, 0.005)),
        ("gelu", "drawn", (0.538, 0.179, 0.077, 0.036, 0.002)),
        ("silu", "drawn", (0.562, 0.187, 0.080, 0.037, 0.002)),
    ],
)
def test_errors_of_step_functions_are_those_of_the_docs(function, criterion, errors):
    got = [advice.step_error(Function(function), bits, Criterion(criterion)) for bits in (1, 2, 3, 4, 8)]
    assert got == pytest.approx(errors, abs=5e-4)


def test_the_paper_is_first_advised_another_criterion():
    model, batch = seeded(lambda: conv(1))
    _, message = warned(model, batch, criterion="paper")
    assert advised(message) == {"criterion": "derivative"}


def test_groups_are_advised_more_bits():
    wanted = {"bits": 4}, {"pairs": "4bit"}, {"pairs": "4bit", "norms": "4bit"}
    for options in wanted:
        model, batch = seeded(lambda: deep_mlp(nn.GELU))
        _, message = warned(model, batch, **options)
        given = {name: "8bit" for name in options if name != "bits"}
        assert advised(message) == {"bits": 8} | given


@pytest.mark.parametrize(
    ("measured", "advised_codes"),
    [
        (GradientFidelity(-1.0, 1e300, 1e300), 'activations="8bit"'),
        (GradientFidelity(0.5, 1e300, 1e300), 'activations="8bit"'),
        (GradientFidelity(0.0, 0.0, 1.0), 'activations="7bit"'),
        (GradientFidelity(1e-200, 1e-300, 1.0), 'activations="7bit"'),
        (GradientFidelity(-0.04, 1.0, 1.4), 'activations="7bit"'),
        (GradientFidelity(0.94, 1.0, 0.35), 'activations="4bit"'),
    ],
)
def test_whatever_is_measured_there_is_an_advice(measured, advised_codes):
    form = ActivationForm(Function.SILU)
    calls = Candidate("", Kind.CALL, "F.gelu and F.silu", Action.TWO_BITS)
    codes = Candidate("", Kind.ACTIVATION, form, Action.TWO_BITS)
    grouped = Candidate("", Kind.ACTIVATION, form, Action.FOUR_BIT_GROUPS)
    given = dict.fromkeys(["activations", "norms", "pairs"])
    for criterion in Criterion:
        wishes = Wishes(2, criterion, norms=True, pairs=True, dropouts=True, exact=False, exclude=())
        found = advice.advice(measured, [codes, calls], wishes, given)
        if criterion is Criterion.DERIVATIVE:
            assert found == advised_codes
        with_exact = advice.advice(measured, [codes, dataclasses.replace(codes, action=Action.EXACT)], wishes, given)
        assert with_exact == ("bits=16" if found.startswith('activations="8bit"') else found)
        most = dataclasses.replace(wishes, bits=8, criterion=Criterion.DERIVATIVE)
        assert advice.advice(GradientFidelity(0.5, 1e300, 1e300), [codes], most, given) is None
        wishes = dataclasses.replace(wishes, pair_groups=4, norm_groups=4)
        assert advice.advice(measured, [codes, grouped], wishes, given).startswith(("bits=8", "bits=16"))
