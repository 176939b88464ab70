"""Library models under torch.compile: in one graph, for any length, and with the backward pass compiled as well."""

import copy

import lomem
import pytest
import torch
import transformers
from small_models import distance
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from zoo import build

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = ("llama", "gpt2", "bert", "vit")
#: Options of conversion: exact, and codes of activations alone. (What is drawn differs from run to run.)
OPTIONS = {"exact": {"bits": 16}, "codes": {"pairs": "keep", "criterion": "derivative"}}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def plain(name):
    model, batch = build(name)
    if name == "gpt2":
        model.loss_type = "ForCausalLM"  # unknown to transformers, which then warns, and that ends the graph
    return model, batch


def converted(name, options):
    model, batch = plain(name)
    report = lomem.convert(model, batch, **OPTIONS[options])
    assert report.saved_after < report.saved_before
    return model, batch


def trained(model, batch, function=None):
    """Loss and gradients."""
    model.zero_grad()
    loss = (model if function is None else function)(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_trained(found, expected):
    """Equal, but for sums in another order."""
    torch.testing.assert_close(found[0], expected[0])
    assert distance(found[1], expected[1]) < 1e-6


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_in_one_graph(name, options):
    model, batch = converted(name, options)
    expected = trained(model, batch)
    assert_trained(trained(model, batch, torch.compile(model, backend="aot_eager", fullgraph=True)), expected)


# The activation of GPT-2 reads numbers from a module.
@pytest.mark.parametrize(("name", "dynamic"), [("llama", None), ("gpt2", None), ("bert", None), ("gpt2", True)])
def test_of_any_length(name, dynamic):
    counts = []
    for model, batch in (plain(name), converted(name, "exact")):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
        for length in (12, 9, 7, 10, 11):
            # (Copies: a view of a longer batch has other strides, which are compiled for again.)
            part = {k: v[:, :length].contiguous() if v.dim() == 2 else v for k, v in batch.items()}
            assert_trained(trained(model, part, compiled), trained(model, part))
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0] <= 3  # of five lengths


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_with_a_compiled_backward_pass(name, options):
    model, batch = converted(name, options)
    expected = trained(model, batch)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter)
    def step():
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    with torch._dynamo.config.patch(compiled_autograd=True):
        loss = step()
    assert counter.frame_count > 1  # forward and backward
    assert_trained((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), expected)


class Regions(nn.Module):
    """Two layers of GPT-2's activation, checkpointed."""

    def __init__(self):
        super().__init__()
        self.activations = nn.ModuleList(transformers.activations.ACT2FN["gelu_new"] for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        for layer, activation in zip(self.layers, self.activations, strict=True):
            x = checkpoint(activation, layer(x), use_reentrant=False)
        return x


def test_what_torch_says_of_numbers_in_two_regions():
    """Which is why activations of several ops are not recomputed if all sizes are dynamic."""
    x = torch.randn(3, 4)
    compiled = torch.compile(Regions(), backend="aot_eager", dynamic=True, fullgraph=True)
    if torch.__version__ < "2.15":
        with pytest.raises(Exception, match="lift_tracked_freevar_to_input should not be called on root"):
            compiled(x)
    else:
        compiled(x).sum().backward()
    with torch._dynamo.config.patch(specialize_float=True):
        torch.compiler.reset()
        model = Regions()
        lomem.convert(model, x, bits=16)
        eager = copy.deepcopy(model)
        compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
        torch.testing.assert_close(compiled(x), eager(x))
