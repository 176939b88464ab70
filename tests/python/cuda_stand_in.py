"""A plugin for pytest (`-p cuda_stand_in`): test_cuda.py where there is no GPU, with tensors of the CPU.

So a rehearsal (`make gpu-rehearse`) finds errors of those tests. What only a GPU has must be deselected.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode

#: In place of 2^31: large enough for the rows of all norms of the tests.
EDGE = 2**17


def on_cpu(device):
    return torch.device("cpu") if str(device).startswith("cuda") else device


class CPUAsCUDA(TorchFunctionMode):
    """Puts on the CPU what is meant for the GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(on_cpu(value) if isinstance(value, str | torch.device) else value for value in args)
        return func(*args, **kwargs)


def pytest_ignore_collect(collection_path):
    return False if collection_path.name == "test_cuda.py" else None


def pytest_collection_modifyitems(items):
    for module in {item.module for item in items if item.module.__name__ == "test_cuda"}:
        module.EDGE = EDGE
        module.BIG = EDGE + 13
        module.STRIDE = 2**15 + 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    with CPUAsCUDA():
        return (yield)


def pytest_configure():
    torch.cuda.mem_get_info = lambda: (2**40, 2**40)
