"""What the commands that draw have in common."""

from __future__ import annotations

from pathlib import Path


def check_folder(option: str, path: str) -> None:
    """Raises a ValueError where a file could not be written for want of its folder."""
    if not Path(path).resolve().parent.is_dir() or Path(path).is_dir():
        raise ValueError(f"{option} is {path}, expected a file in a folder that exists")


def check_plot(path: str, extra: str) -> None:
    """Raises where ``--plot`` could not be drawn: before the work, not after it."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(f"--plot needs the package {error.name}: pip install 'lomem[{extra}]'") from error
    suffixes = matplotlib.figure.Figure().canvas.get_supported_filetypes()
    if Path(path).suffix.lstrip(".") not in suffixes:
        raise ValueError(f"--plot is {path}, expected a file name that ends in one of {', '.join(suffixes)}")
    check_folder("--plot", path)
