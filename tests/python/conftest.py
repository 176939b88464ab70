import os

import hypothesis
import lomem
import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and lomem._C.cuda_archs() else [])]

# The same examples in every CI run, new ones on a developer's machine.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device that lomem has kernels for."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
