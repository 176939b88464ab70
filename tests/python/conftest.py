import lomem
import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and lomem._C.cuda_archs() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device that lomem has kernels for."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
