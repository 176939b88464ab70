"""How close gradients are at initialization, for every setting of lomem.convert: half of the rule for its default.

    python benchmarks/initial_gradients.py                          # tests/python/zoo.py's models, and larger ones
    python benchmarks/initial_gradients.py --nets efficientnet-b0 --settings "steps, 4 bits"

A setting passes on a net if the cosine of its gradient to the exact one is at least 0.99: that of one pass, or, for
codes drawn at random and for groups, that of the mean of 8 draws, of which each has to have 0.9. Codes replace exact
pairs here, so that every activation of a net takes part. Writes benchmarks/results/initial-gradients.md.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests/python")]

import lomem  # noqa: E402
import torch  # noqa: E402
import transformers as tf  # noqa: E402
from fidelity import SETTINGS  # noqa: E402
from finetuning import gradients  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from zoo import ZOO  # noqa: E402

Made = tuple[nn.Module, dict[str, Any]]

RESULTS = ROOT / "benchmarks/results/initial-gradients.md"
#: Draws whose mean is compared.
DRAWS = 8
#: Least cosines: of one pass of a setting without draws, and of the mean; of one draw.
ENOUGH, ENOUGH_OF_ONE = 0.99, 0.9
#: What is compared: all settings that change gradients.
COMPARED = [name for name in SETTINGS if not name.startswith(("plain", "exact"))]


def _images(size: int, batch: int, channels: int = 3) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, channels, size, size), "labels": torch.arange(batch) % 10}


def _tokens(batch: int = 4, length: int = 64) -> dict[str, Tensor]:
    ids = torch.randint(5, 990, (batch, length))
    return {"input_ids": ids, "labels": ids}


def _convolutions(model: nn.Module) -> nn.Module:
    """The model with the weights of its convolutions drawn as in the papers on EfficientNet and MobileNet.

    Transformers draws them with a standard deviation of 0.02, so small that BatchNorm's epsilon counts.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    return model


def _efficientnet() -> Made:
    config = tf.EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0, image_size=64, hidden_dim=1280)
    return _convolutions(tf.EfficientNetForImageClassification(_ten(config))), _images(64, 8)


def _mobilevit() -> Made:
    config = tf.MobileViTConfig(
        image_size=64, hidden_sizes=[64, 80, 96], neck_hidden_sizes=[16, 32, 48, 64, 80, 96, 320]
    )
    return _convolutions(tf.MobileViTForImageClassification(_ten(config))), _images(64, 8)


def _mobilevit_v2() -> Made:
    config = tf.MobileViTV2Config(image_size=64, width_multiplier=0.5)
    return _convolutions(tf.MobileViTV2ForImageClassification(_ten(config))), _images(64, 8)


def _ten(config: Any) -> Any:
    config.num_labels = 10
    return config


_WIDTH = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 1000}


def _gpt2() -> Made:
    config = tf.GPT2Config(vocab_size=1000, n_embd=256, n_layer=6, n_head=4, n_positions=64)
    return tf.GPT2LMHeadModel(config), _tokens()


def _llama() -> Made:
    config = tf.LlamaConfig(**_WIDTH, intermediate_size=688, num_key_value_heads=2, pad_token_id=0)
    return tf.LlamaForCausalLM(config), _tokens()


def _bert() -> Made:
    return tf.BertForMaskedLM(tf.BertConfig(**_WIDTH, intermediate_size=1024)), _tokens()


def _vit() -> Made:
    width = {name: value for name, value in _WIDTH.items() if name != "vocab_size"}
    config = tf.ViTConfig(**width, intermediate_size=1024, image_size=64, patch_size=8)
    return tf.ViTForImageClassification(_ten(config)), _images(64, 8)


def _conv() -> Made:
    from fidelity_tasks import ConvNet

    images = torch.randn(8, 1, 16, 16)
    return ConvNet(32, 24), {"pixel_values": images, "labels": torch.arange(8)}


#: Functions that make a net and its batch: those that the rule names, then the zoo.
NETS: dict[str, Callable[[], Made]] = {
    "efficientnet-b0": _efficientnet,
    "mobilevit": _mobilevit,
    "mobilevit-v2": _mobilevit_v2,
    "conv, BatchNorm, SiLU": _conv,
    "gpt2 (6 layers)": _gpt2,
    "llama (6 layers)": _llama,
    "bert (6 layers)": _bert,
    "vit (6 layers)": _vit,
    **{f"zoo: {name}": lambda entry=entry: (entry.model(), entry.batch()) for name, entry in ZOO.items()},
}


def flat(gradient: Mapping[str, Tensor], names: list[str]) -> Tensor:
    """The gradient as one vector."""
    return torch.cat([gradient[name].flatten() for name in names])


def cosines(name: str, setting: str) -> tuple[float, float] | None:
    """Least cosine of one draw, and that of the mean; None where nothing is converted that changes gradients."""
    torch.manual_seed(0)
    model, batch = NETS[name]()
    model.train()
    exact = gradients(model, batch, None)
    names = list(exact)
    try:
        report = lomem.convert(model, batch, gradients=False, check=False, **(SETTINGS[setting] or {}))
    except lomem.NothingToConvertError:
        return None
    if not any(decision.action.endswith(("bit", "groups")) for decision in report.decisions):
        return None
    e = flat(exact, names)
    draws = DRAWS if setting.startswith("drawn") or not setting.startswith("steps") else 1
    lomem.random.manual_seed(0)
    each = [flat(gradients(model, batch, None), names) for _ in range(draws)]

    def cosine(g: Tensor) -> float:
        return float(g @ e) / math.sqrt(float(g @ g) * float(e @ e))

    return min(map(cosine, each)), cosine(torch.stack(each).mean(0))


def passes(setting: str, one: float, mean: float) -> bool:
    """Whether these cosines are enough."""
    if setting.startswith("steps"):
        return one >= ENOUGH
    return mean >= ENOUGH and one >= ENOUGH_OF_ONE


def table(found: Mapping[tuple[str, str], tuple[float, float] | None], nets: list[str], settings: list[str]) -> str:
    """The comparison in Markdown."""
    lines = ["# Gradients at initialization", "", "| net | " + " | ".join(settings) + " |"]
    lines.append("|---|" + "---:|" * len(settings))

    def cell(net: str, setting: str) -> str:
        both = found[net, setting]
        if both is None:
            return ""
        one, mean = both
        text = f"{one:.4f}" if setting.startswith("steps") else f"{mean:.4f} ({one:.4f})"
        return text if passes(setting, one, mean) else f"**{text}**"

    lines += [f"| {net} | " + " | ".join(cell(net, setting) for setting in settings) + " |" for net in nets]
    verdicts = []
    for setting in settings:
        own = [(net, both) for net in nets if (both := found[net, setting]) is not None]
        failed = [net for net, both in own if not passes(setting, *both)]
        verdicts.append("passes" if not failed else f"fails on {len(failed)} of {len(own)}")
    lines += ["| all | " + " | ".join(verdicts) + " |", ""]
    lines += [
        "Cosine of the whole gradient to the exact one, in float32 and training mode. For drawn codes and groups: that "
        f"of the mean of {DRAWS} draws, and the least one of one draw. Bold: under {ENOUGH}, or under {ENOUGH_OF_ONE} "
        "for one draw. Codes replace exact pairs. Empty: nothing is converted that changes the gradient.",
        "",
        f"torch {torch.__version__}, transformers {tf.__version__}",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS), metavar="NET")
    parser.add_argument("--settings", nargs="+", choices=COMPARED, default=COMPARED, metavar="SETTING")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file for the table (default: %(default)s)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    found = {}
    for net in options.nets:
        for setting in options.settings:
            found[net, setting] = cosines(net, setting)
            print(net, setting, found[net, setting], file=sys.stderr, flush=True)
    text = table(found, options.nets, options.settings)
    print(text)
    options.results.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
