"""The command ``lomem``."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import torch

from . import _C, __version__


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a number of at least 1")
    return value


def info() -> int:
    """Prints what is installed and what runs."""
    archs = " ".join(_C.cuda_archs())
    cuda = "none (CPU-only build)" if not archs else archs if torch.version.cuda else f"{archs}, not loaded"
    rows = {
        "lomem": __version__,
        "built against torch": _C.torch_version,
        "running with torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": _C.compiler,
        "CPU kernels": _C.cpu_capability(),
        "CPU capability of torch": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "CUDA kernels": cuda,
        "CUDA of torch": torch.version.cuda or "none",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo  # needs the optional packages

    return demo.main(seeds=arguments.seeds, epochs=arguments.epochs, plot_path=arguments.plot)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="lomem", description="Less activation memory in PyTorch training.")
    result.add_argument("--version", action="version", version=f"lomem {__version__}")
    commands = result.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print what is installed and which kernels run").set_defaults(run=lambda _: info())
    demo = commands.add_parser(
        "demo",
        help="train a small Vision Transformer with plain torch and with lomem",
        description="Trains a small Vision Transformer on scikit-learn's digits on the CPU, with plain torch "
        "and with lomem, from the same seeds, and compares them.",
    )
    demo.add_argument("--seeds", type=_positive, default=1, metavar="N", help="repeat with N seeds (default: 1)")
    demo.add_argument("--epochs", type=_positive, default=None, metavar="N", help="epochs of each training run")
    demo.add_argument("--plot", metavar="FILE.png", help="draw the comparison")
    demo.set_defaults(run=_demo)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parsed = parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except (ImportError, ValueError) as error:
        print(f"lomem {parsed.command}: {error}", file=sys.stderr)
        return 1
