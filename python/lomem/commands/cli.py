"""The ``lomem`` command line."""

from __future__ import annotations

import argparse
import contextlib
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .. import _C, __version__
from . import terminal


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a number of at least 1")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, expected a number greater than 0")
    return value


def _count(text: str) -> int:
    """Parses a count with an optional binary suffix: `64M` is 64 * 2^20."""
    match = re.fullmatch(r"([1-9][0-9]*)([KMG]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"got {text or 'nothing'}, expected a size such as 4096, 64K or 1M")
    return int(match[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[match[2]]


def _shape(text: str) -> tuple[int, int]:
    rows, times, columns = text.partition("x")
    if not times:
        raise argparse.ArgumentTypeError(f"got {text or 'nothing'}, expected rows and columns such as 8192x768")
    return _count(rows), _count(columns)


def _list_of(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse_list(text: str) -> list[Any]:
        return list(dict.fromkeys(parse(part) for part in text.split(",")))

    parse_list.__name__ = "list"  # argparse shows it in its error messages
    return parse_list


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"got {text}, expected cpu or cuda") from error


def info() -> int:
    """Prints versions and the kernels in use."""
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


def _bench(arguments: argparse.Namespace) -> int:
    from . import bench  # needs the optional packages

    return bench.main(arguments)


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="benchmark lomem's ops against torch's",
        description="Benchmarks lomem's ops against torch, compiled torch and, on a GPU, Liger-Kernel and apex. "
        "The contenders and memory copies take turns. Lists are comma-separated: --elements 64K,1M.",
    )
    measured = bench.add_argument_group("measurement")
    options = [
        measured.add_argument("--device", type=_device, help="cpu or cuda (default: a GPU if there is one)"),
        measured.add_argument(
            "--threads", type=_list_of(_positive), metavar="N,...", help="numbers of CPU threads (default: 1 and all)"
        ),
        measured.add_argument(
            "--elements",
            type=_list_of(_count),
            metavar="N,...",
            help="input sizes of activations (default: 4K,64K,1M,16M,64M; on a GPU 1M,16M,64M)",
        ),
        measured.add_argument(
            "--shapes",
            type=_list_of(_shape),
            metavar="RxC,...",
            help="input shapes of norms (default: 8192x768,2048x4096; on a GPU 64M elements in rows of 768 to 16K)",
        ),
        measured.add_argument(
            "--dtypes", type=_list_of(str), metavar="DTYPE,...", help="fp32, bf16, fp16, fp64 (default: fp32,bf16,fp16)"
        ),
        measured.add_argument("--rounds", type=_positive, metavar="N", help="number of rounds (default: 15)"),
        measured.add_argument(
            "--seconds", type=_positive_float, metavar="S", help="per contender and round, roughly (default: 0.005)"
        ),
        measured.add_argument("--compile", action="store_true", help="also measure torch.compile (slow)"),
        measured.add_argument(
            "--rotate", action="store_true", help="rotate inputs through more memory than the caches hold, as on a GPU"
        ),
        measured.add_argument("--json", metavar="FILE", help="write the results"),
    ]
    shown = bench.add_argument_group("output")
    shown.add_argument(
        "--only", type=_list_of(str), metavar="CASE,...", help="cases: activations, norms, gelu, silu, layer-norm, ..."
    )
    shown.add_argument("--table", metavar="FILE.md", help="write the speedups")
    shown.add_argument("--plot", metavar="FILE.png", help="plot the bandwidth of the first activation")
    shown.add_argument(
        "--from", dest="from_file", metavar="FILE", help="show results that --json wrote; measure nothing"
    )

    def run(arguments: argparse.Namespace) -> int:
        given = [o.option_strings[0] for o in options if getattr(arguments, o.dest) not in (None, False)]
        if arguments.from_file is not None and given:
            raise ValueError(f"{given[0]} is given with --from, expected only one of them")
        return _bench(arguments)

    bench.set_defaults(run=run)


def _model_command(name: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        from . import model  # needs the optional packages

        if isinstance(arguments.lora, str):
            arguments.lora = model.parse_lora(arguments.lora)
        return getattr(model, name)(arguments)

    return run


def _add_model_options(command: Any) -> None:
    model = command.add_argument_group("model")
    model.add_argument(
        "--model", metavar="NAME", help="llama-7b, vit-b, roberta-base, ... or the path of a transformers config"
    )
    model.add_argument(
        "--lora", metavar="r=N,...", help="LoRA; also targets=qv or all, dropout=P, dtype=fp32, bf16, fp16"
    )
    model.add_argument("--4bit", dest="four_bit", action="store_true", help="store the frozen linear layers in 4 bits")
    model.add_argument("--no-peft-cast", action="store_true", help="keep peft's LoRA layers from casting their input")
    model.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="dtype of the weights; turns autocast off")
    model.add_argument("--autocast", choices=["bf16", "fp16", "none"], help="dtype of automatic mixed precision")


def _add_memory(commands: Any) -> None:
    command = commands.add_parser(
        "memory",
        help="estimate the training memory of a model, plain and converted",
        description="Estimates the memory of a training step of a model, plain and with lomem or gradient "
        "checkpointing, without weights and without a GPU.",
    )
    _add_model_options(command)
    command.add_argument(
        "--paper", action="store_true", help="estimate the settings of the paper instead of one model (takes minutes)"
    )
    command.add_argument("--only", type=_list_of(str), metavar="NAME,...", help="with --paper: only these models")
    measured = command.add_argument_group("estimate")
    measured.add_argument(
        "--method",
        type=_list_of(str),
        metavar="NAME,...",
        help="plain, activations, norms, lomem (both), exact, 8bit, 8bit-pairs, 4bit, gated-mlp, one-cast, checkpoint, "
        "lomem+checkpoint (default: plain,lomem,checkpoint)",
    )
    measured.add_argument("--batch", type=_positive, metavar="N", help="sequences or images per batch")
    measured.add_argument("--seq", type=_positive, metavar="N", help="tokens per sequence")
    measured.add_argument(
        "--optimizer", choices=["adamw", "sgd", "none"], default="adamw", help="optimizer of the step (default: adamw)"
    )
    measured.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="device whose ops are estimated (default: cuda)"
    )
    shown = command.add_argument_group("output")
    shown.add_argument("--json", metavar="FILE", help="write the results")
    shown.add_argument("--table", metavar="FILE.md", help="write the table")
    shown.add_argument("--plot", metavar="FILE.png", help="plot the results")
    command.set_defaults(run=_model_command("main_memory"))


def _add_convert(commands: Any) -> None:
    command = commands.add_parser(
        "convert",
        help="print what lomem.convert would do to a model",
        description="Prints what lomem.convert would do to a model with random weights, norm by norm. To convert a "
        "model, call lomem.convert(model, example_inputs) in a program.",
    )
    _add_model_options(command)
    command.add_argument(
        "--dry-run", action="store_true", required=True, help="required: the command only prints, it converts nothing"
    )
    command.add_argument("--bits", type=int, choices=[16, 8, 4, 2], help="as lomem.convert's bits")
    command.add_argument("--every", action="store_true", help="a row per module, not per kind of module")
    command.set_defaults(run=_model_command("main_convert"))


def _fit(arguments: argparse.Namespace) -> int:
    from . import fit  # needs the optional packages

    return fit.main(arguments)


def _add_fit(commands: Any) -> None:
    command = commands.add_parser(
        "fit",
        help="fit optimal step functions to an activation",
        description="Fits optimal step functions to the derivative of an activation and reports the accuracy of the "
        "gradients. Lists are comma-separated: --bits 2,3,4.",
    )
    command.add_argument("function", metavar="FUNCTION", help="gelu, silu, sigmoid, tanh, ...")
    command.add_argument(
        "--bits",
        type=_list_of(_positive),
        default=[2, 3, 4],
        metavar="N,...",
        help="bits per element, 1 to 8 (default: 2,3,4)",
    )
    command.add_argument(
        "--criterion", metavar="NAME,...", help="primitive (fit the activation), derivative (default: both)"
    )
    command.add_argument(
        "--density", choices=["uniform", "gaussian"], default="uniform", help="density of the fit (default: uniform)"
    )
    command.add_argument(
        "--measure",
        choices=["uniform", "gaussian"],
        default="gaussian",
        help="density of the mean errors of the gradient (default: gaussian)",
    )
    command.add_argument(
        "--digits-up-to", type=int, default=4, metavar="N", help="print step functions up to N bits (default: 4)"
    )
    command.add_argument("--json", metavar="FILE", help="write the results")
    command.add_argument("--plot", metavar="FILE.png", help="plot the function, its derivative and the steps")
    command.set_defaults(run=_fit)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = argparse.ArgumentParser(prog="lomem", description="Less activation memory in PyTorch training.")
    result.add_argument("--version", action="version", version=f"lomem {__version__}")
    commands = result.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions and the kernels in use").set_defaults(run=lambda _: info())
    demo = commands.add_parser(
        "demo",
        help="train a small Vision Transformer with plain torch and with lomem",
        description="Trains a small Vision Transformer on scikit-learn's digits on the CPU, with plain torch "
        "and with lomem, from the same seeds, and compares them.",
    )
    demo.add_argument("--seeds", type=_positive, default=1, metavar="N", help="repeat with N seeds (default: 1)")
    demo.add_argument("--epochs", type=_positive, default=None, metavar="N", help="epochs per training run")
    demo.add_argument("--plot", metavar="FILE.png", help="plot the comparison")
    demo.set_defaults(run=_demo)
    _add_memory(commands)
    _add_convert(commands)
    _add_fit(commands)
    _add_bench(commands)
    return result


@contextlib.contextmanager
def _flushed() -> Iterator[None]:
    # Flushing here lets main() catch errors that the interpreter would otherwise report at exit.
    try:
        yield
    finally:
        sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    command = "lomem"
    try:
        with terminal.readable(sys.stdout), _flushed():
            parsed = parser().parse_args(arguments)
            command = f"lomem {parsed.command}"
            return parsed.run(parsed)
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return terminal.INTERRUPTED
    except BrokenPipeError:
        terminal.stop_writing(sys.stdout)
        return terminal.PIPE_CLOSED
    except (ImportError, ValueError, OSError) as error:
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        if isinstance(error, OSError):
            terminal.stop_writing(sys.stdout)
        return 1
