"""Checks shared by the commands that plot or write files."""

from __future__ import annotations

from pathlib import Path


def check_folder(option: str, path: str) -> None:
    """Raises a ValueError if the folder of an output file does not exist, or the path is a folder."""
    if not Path(path).resolve().parent.is_dir() or Path(path).is_dir():
        raise ValueError(f"{option} is {path}, expected a file in a folder that exists")


def check_plot(path: str, extra: str) -> None:
    """Raises before a long run if its ``--plot`` could not be written."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(f"--plot needs the package {error.name}: pip install 'lomem[{extra}]'") from error
    suffixes = matplotlib.figure.Figure().canvas.get_supported_filetypes()
    if Path(path).suffix.lstrip(".") not in suffixes:
        raise ValueError(f"--plot is {path}, expected a file name that ends in one of {', '.join(suffixes)}")
    check_folder("--plot", path)
