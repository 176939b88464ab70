"""Devices without kernels run the reference: which kernel the dispatcher finds, the warning, and all ops on one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lomem import _other_devices, reference

HERE = Path(__file__).parent
OPS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lomem::"))
#: Devices with kernels in C++, and HIP, whose tensors torch dispatches as CUDA's.
IN_CPP = {"CPU", "CUDA", "Meta", "HIP"}


def dense_backends():
    """All devices that the dispatcher knows."""
    names = list(torch._C.DispatchKey.__members__)
    return set(names[names.index("StartOfDenseBackends") + 1 : names.index("EndOfDenseBackends")])


def table(op):
    """Where the kernel of each dispatch key is registered, for keys with one."""
    lines = torch._C._dispatch_dump_table(op).splitlines()
    return dict(re.findall(r"^(\w+): registered at (\S+):\d+ ", "\n".join(lines), re.MULTILINE))


def test_every_device_is_listed():
    assert set(_other_devices.DISPATCH_KEYS) == dense_backends() - IN_CPP
    assert {f"lomem::{name}" for name in reference.OPS} < set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_kernels(op):
    """On other devices no op is refused; on those with kernels, and in other layouts, nothing is different."""
    where = {key: Path(file).name for key, file in table(op).items()}
    ours = Path(_other_devices.__file__).name
    for key in _other_devices.DISPATCH_KEYS:
        # (registration.cpp refuses; other files have ops that are made of torch's.)
        assert where[key] != "registration.cpp", key
        assert (where[key] == ours) == (op.removeprefix("lomem::") in reference.OPS), key
    others = {key: file for key, file in where.items() if key not in _other_devices.DISPATCH_KEYS}
    assert {"CPU", "CUDA", "Meta", "SparseCPU", "QuantizedCPU", "SparseMPS"} <= set(others)
    assert all(file.endswith((".cpp", ".h")) for file in others.values()), others


def run(*command, **variables):
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=HERE,
        env={**os.environ, **variables},
    )


WARNING = """
import warnings
import torch
from other_device import DEVICE
import lomem

x = torch.linspace(-1, 1, 8).reshape(2, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    lomem.functional.regelu2(x.requires_grad_()).sum().backward()
    assert not caught, caught[0]
    there = x.detach().to(DEVICE)
    for _ in range(2):
        lomem.functional.ms_rms_norm(there, (4,))
        lomem.functional.pack_bits(there.to(torch.uint8), 1)
for warning in caught:
    print(warning.category.__name__, warning.message)
"""


def test_one_warning_in_a_process():
    result = run("-c", WARNING)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "UserWarning lomem has no kernels for lab: its ops run their reference implementation (lomem.reference) there, "
        "which is slower and takes more memory while it runs"
    ]


@pytest.mark.parametrize("without_float64", ["", "1"], ids=["float64", "no float64"])
def test_ops_and_models_on_such_a_device(without_float64):
    """In a process of its own, since a device cannot be unregistered."""
    result = run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "other_device_cases.py"),
        LOMEM_NO_FLOAT64=without_float64,
    )
    assert result.returncode == 0, result.stdout[-20000:]
    passed = re.search(r"^(\d+) passed(?:, \d+ warnings?)? in ", result.stdout, re.MULTILINE)
    assert passed is not None, result.stdout[-2000:]
    assert int(passed[1]) > 200
