"""Loads programs that hold lomem's ops, in a process that has not imported lomem."""

import subprocess
import sys
import tempfile
from pathlib import Path

import lomem
import torch

#: How each kind of program is loaded.
LOADERS = {
    "torch.export": "torch.export.load",
    "torch.jit": "torch.jit.load",
    "AOTInductor": "torch._inductor.aoti_load_package",
}


def save(kind, path, module, x, **options):
    """Saves a module as a program of a kind. Options: a table of decompositions."""
    if kind == "torch.jit":
        torch.jit.trace(module, x).save(path)
        return
    with torch.no_grad():
        program = torch.export.export(module, (x,))
        if "decompositions" in options:
            program = program.run_decompositions(options["decompositions"])
        if kind == "AOTInductor":
            torch._inductor.aoti_compile_and_package(program, package_path=path)
        else:
            torch.export.save(program, path)


def load(kind, path, before=""):
    """Loads a program in a new process, in which other code may run before; raises what it prints if it fails.

    Returns:
        Whether lomem was imported there.
    """
    code = f"import sys, torch\n{before}\n{LOADERS[kind]}({path!r})\nprint('lomem' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=600)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return run.stdout.split()[-1] == "True"


def refused(kind):
    """Raises what torch says of a layer of lomem."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.pt2")
        save(kind, path, lomem.nn.GELU(), torch.randn(2, 3))
        load(kind, path)
