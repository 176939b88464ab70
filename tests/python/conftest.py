import os

import helpers
import hypothesis
import lomem
import pytest
import torch

# A library that runs the CUDA kernels on the CPU, replacing the CPU kernels (tests/cpp/cuda/on_host.cpp).
if helpers.CUDA_ON_HOST:
    torch.ops.load_library(helpers.CUDA_ON_HOST)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and lomem._C.cuda_archs() else [])]

# Tests that need a GPU.
collect_ignore = [] if "cuda" in DEVICES else ["test_cuda.py"]

# CI runs use the same examples every time; other runs draw new ones.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


def pytest_collection_modifyitems(config, items):
    if helpers.CUDA_ON_HOST:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("cpu_kernels")])
        items[:] = [item for item in items if not item.get_closest_marker("cpu_kernels")]


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device that lomem has kernels for."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Limits torch to one thread, for models of small layers: workers whose threads compete would take minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """A directory with the config of a small model."""
    import transformers

    folder = tmp_path_factory.mktemp("config")
    transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        use_cache=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return str(folder)
