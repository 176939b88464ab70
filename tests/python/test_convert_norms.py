"""Converting norms in hand-made models."""

import copy

import lomem
import pytest
import torch
import torch.nn.functional as F
from small_models import NORMS, Block, D, PostNorm, RMSNorm, actions, batch, distance, ill_norm, make, results
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])
@pytest.mark.parametrize("block", [Block, PostNorm])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_norms_change_nothing_but_rounding(norm, ill, block, dtype):
    model, x = make(block, norm=norm, ill=ill, dtype=dtype), batch(dtype)
    exact = copy.deepcopy(model).double()
    y, grads = results(model, x)
    report = lomem.convert(model, x, activations="keep")
    assert {d.action for d in report.decisions if d.kind == "norm"} == {"normalized" if ill else "inverted"}
    assert report.saved_after < report.saved_before
    y2, grads2 = results(model, x)
    exact_y, exact_grads = results(exact, x.double())
    eps = torch.finfo(dtype).eps
    # One rounding of the norms' output more or less, propagated through four layers with weights of order 1.
    assert (y2.double() - y.double()).norm() <= 4 * eps * y.double().norm()
    # No less accurate, apart from chance in rounding: a factor, and a few roundings where the original is the oracle.
    before, after = distance(grads, exact_grads), distance(grads2, exact_grads)
    assert after <= max(2 * before, 16 * eps), (before, after)
    error = (y2.double() - exact_y).norm()
    assert error <= max(1.5 * (y.double() - exact_y).norm(), 4 * eps * exact_y.norm() if dtype == torch.float64 else 0)


@pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("block", [Block, PostNorm])
def test_norms_under_autocast(norm, ill, block):
    model, x = make(block, norm=norm, ill=ill), batch()
    exact = copy.deepcopy(model).double()
    with torch.autocast("cpu", torch.bfloat16):
        y, grads = results(model, x)
        report = lomem.convert(model, x, activations="keep")
        y2, grads2 = results(model, x)
    wanted = "normalized" if ill else "inverted" if block is Block else "two outputs"
    assert {d.action for d in report.decisions if d.kind == "norm"} == {wanted}
    _, exact_grads = results(exact, x.double())
    # Linear layers round the norms' output to bfloat16 anyway. Rounding to float32 first makes some elements differ.
    assert (y2 - y).double().norm() <= 2**-8 * y.double().norm()
    assert y2.dtype == y.dtype
    assert distance(grads2, exact_grads) <= 1.5 * distance(grads, exact_grads)


def test_a_post_norm_model_under_autocast_keeps_one_copy_and_its_residual_stream_in_float32():
    model, x = make(PostNorm, depth=1), batch()
    block, n, rows = model[1], x.numel(), x.numel() // D
    seen = []
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        report = lomem.convert(model, x)
        del seen[1:]
        model(x)
    assert actions(report) == {"1.norm": "two outputs"}
    assert seen[0].dtype == seen[1].dtype == torch.float32
    torch.testing.assert_close(*seen, rtol=0, atol=2**-8)  # bfloat16 products of order 1
    # Before: the sum in float32, mean and rstd, and one cast each for q and k. After: one cast, and rstd.
    assert report.saved_before - report.saved_after == 4 * n + 2 * 4 * rows + 2 * (2 * n) - (2 * n + 4 * rows)


def test_no_norm_is_converted_for_an_output_that_nobody_keeps():
    model, x = make(), batch()
    for linear in (model[1].up, model[1].gate):
        linear.requires_grad_(False)
    report = lomem.convert(model, x, activations="keep")
    left = next(d for d in report.decisions if d.name == "1.norm")
    assert (left.action, left.reason) == ("left", "no consumer saves its output: the weight of Linear is frozen")
    assert actions(report)["2.norm"] == "inverted"


def test_a_composite_norm_is_converted_where_it_keeps_less_by_itself():
    model, x = make(norm=RMSNorm), batch()
    for linear in (model[1].up, model[1].gate):
        linear.requires_grad_(False)
    report = lomem.convert(model, x, activations="keep")
    assert actions(report)["1.norm"] == "inverted"
    assert report.saved_after < report.saved_before


def test_norms_of_one_input_are_converted_together():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fa, self.fb = nn.LayerNorm(D), nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x):
            return x + self.fa(self.a(x)) + self.fb(self.b(x))

    model, x = make(Parallel, depth=1), batch()
    report = lomem.convert(model, x)
    assert actions(report) == {"1.a": "inverted", "1.b": "inverted"}
    rows = x.numel() // D
    assert report.saved_before - report.saved_after == 4 * x.numel() + 2 * 4 * rows
    lomem.restore(model)
    model[1].fb.weight.requires_grad_(False)  # now the second norm must save x, and converting the first gains nothing
    with pytest.raises(ValueError, match=r"LayerNorm \(its input is also saved by 1.b\).*no consumer saves its output"):
        lomem.convert(model, x)


class Inner(nn.Module):
    """A norm, an operation on its output, and linear layers."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc, self.other = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, D)
        self.dropout = nn.Dropout(0.5)


class Hidden(Inner):
    def forward(self, x):
        z = self.norm(x)
        return self.fc(z) + F.linear(z, self.other.weight) * torch.exp(-z * z)


class Stashed(Inner):
    def forward(self, x):
        self.stash = self.norm(x)
        y = self.fc(self.stash)
        return y + self.later()

    def later(self):
        return self.stash.sin() @ self.other.weight


class FedFromElsewhere(Inner):
    def forward(self, x):
        z = self.norm(x)
        return self.fc(z) + self.fc(x) + self.fc(2 * z)


class Between(Inner):
    def forward(self, x):
        return self.fc(self.dropout(self.norm(x)))


class Tied(Inner):
    def __init__(self):
        super().__init__()
        self.other.weight = self.fc.weight

    def forward(self, x):
        return self.fc(self.norm(x)) + self.other(x)


class Twice(Inner):
    def forward(self, x):
        return self.fc(self.norm(self.other(self.norm(x))))


class Viewed(Inner):
    def forward(self, x):
        z = self.norm(x)
        return self.fc(z.flatten(0, -2)).reshape(z.shape) + self.other(z.transpose(0, 1)).transpose(0, 1)


class UsesItsGamma(Inner):
    def forward(self, x):
        return self.fc(self.norm(x)) * self.norm.weight


class Stacked(Inner):
    def forward(self, x):
        z = self.norm(x)
        return self.fc(torch.cat([z, z[:1]]))[:-1]


class OtherWayInEvaluation(Inner):
    def forward(self, x):
        z = self.norm(x)
        return self.fc(z) if self.training else self.other(z.relu())


class Returned(Inner):
    def forward(self, x):
        z = self.norm(x)
        self.fc(z)
        return z


ADVERSARIES = [
    Hidden,
    Stashed,
    FedFromElsewhere,
    Between,
    Tied,
    Twice,
    Viewed,
    UsesItsGamma,
    Stacked,
    OtherWayInEvaluation,
    Returned,
]


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_no_model_goes_wrong(adversary, ill, autocast, training):
    # Either converted correctly or not converted; in float64, where rounding is no excuse, or under autocast.
    dtype = torch.float32 if autocast else torch.float64
    model, x = make(adversary, ill=ill, dtype=dtype, depth=1).train(training), batch(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(3)
        y, grads = results(model, x)
        if not lomem.convert(model, x, dry_run=True).converted:
            return  # not converted at all, which is correct too
        report = lomem.convert(model, x)
        assert report.saved_after <= report.saved_before
        torch.manual_seed(3)
        y2, grads2 = results(model, x)
    # Rounding in float64 through four layers; in up to three bfloat16 products in a row, where single elements of 300
    # (the large bias) meet.
    assert (y2 - y).norm() <= (2**-6 if autocast else 1e-14) * y.norm()
    assert distance(grads2, grads) <= (2**-5 if autocast else 1e-13)


def test_an_output_that_is_changed_in_place_is_left():
    class InPlace(Inner):
        def forward(self, x):
            return self.fc(self.norm(x).mul_(2))

    with pytest.raises(ValueError, match="its output is changed in place by mul_ in 1"):
        lomem.convert(make(InPlace, depth=1), batch())


@pytest.mark.parametrize("ill", [False, True])
def test_a_second_derivative_is_no_part_of_one(ill):
    # The error must not depend on which inputs are asked for: torch runs only what lies on the way to them.
    model, x = make(PostNorm, depth=1, ill=ill), batch()
    with torch.autocast("cpu", torch.bfloat16):
        lomem.convert(model, x, activations="keep")
        loss = model(x).float().square().sum()
    for inputs in ([model[0].weight], [model[1].q.weight], list(model.parameters())):
        with pytest.raises(RuntimeError, match=r"cannot be differentiated twice|not implemented"):
            torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)


def test_an_output_changed_in_place_later_is_noticed():
    # Only if a flag is set, so not in the example run. The linear layer must not take what was saved before the change.
    class Later(Inner):
        flag = False

        def forward(self, x):
            z = self.norm(x)
            if self.flag:
                z = z.mul_(2)
            return self.fc(z)

    model, x = make(Later, ill=True, depth=1, dtype=torch.float64), batch(torch.float64)
    assert actions(lomem.convert(model, x)) == {"1.norm": "normalized"}
    plain = copy.deepcopy(model)
    lomem.restore(plain)
    model[1].flag = plain[1].flag = True
    y, grads = results(model, x)
    y2, grads2 = results(plain, x)
    torch.testing.assert_close(y, y2)
    assert distance(grads, grads2) < 1e-13


def test_every_norm_has_a_verdict():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.batch_norm, self.group_norm = nn.BatchNorm1d(D), nn.GroupNorm(4, D)
            self.layer_norm, self.fc = nn.LayerNorm(D), nn.Linear(D, D)

        def forward(self, x):
            x = self.batch_norm(x.flatten(0, 1))
            return self.fc(self.layer_norm(self.group_norm(x)))

    model = Many()
    before = copy.deepcopy(model.state_dict())
    report = lomem.convert(model, batch())
    # A batch norm is not a layer norm.
    assert actions(report) == {"group_norm": "left", "layer_norm": "inverted"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name  # running statistics too, after runs in training mode


def test_converting_decides_by_what_is_frozen():
    # As in low-rank adapters: the base is frozen, and small matrices next to it are trained.
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.base = nn.LayerNorm(D), nn.Linear(D, D).requires_grad_(False)
            self.a, self.b = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)

        def forward(self, x):
            z = self.norm(x)
            return x + self.base(z) + self.b(self.a(z))

    for ill in (False, True):
        model, x = make(Adapted, ill=ill, dtype=torch.float64), batch(torch.float64)
        y, grads = results(model, x)
        report = lomem.convert(model, x)
        assert set(actions(report).values()) == {"normalized" if ill else "inverted"}
        y2, grads2 = results(model, x)
        torch.testing.assert_close(y, y2)
        assert distance(grads2, grads) < 1e-13


def test_a_linear_layer_without_autocast_behind_a_norm_with_it():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = ill_norm(), nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x):
            z = self.norm(x.float())
            with torch.autocast("cpu", enabled=False):
                b = self.b(z)
            return self.a(z) + b

    model, x = make(Mixed, depth=1), batch()
    with torch.autocast("cpu", torch.bfloat16):
        _, grads = results(model, x)
        lomem.convert(model, x)
        _, grads2 = results(model, x)
    # In float32 throughout: its input is not recomputed from bfloat16.
    torch.testing.assert_close(grads2["1.b.weight"], grads["1.b.weight"])


def test_no_overflow_in_float16_that_the_original_has_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), ill_norm(), nn.Linear(D, D)).half()
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
        model[1].bias.mul_(1e-3)
    x = torch.randn(4096, D).half()
    lomem.convert(model, x[:8])
    (model(x) * 30).sum().backward()
    assert model[2].weight.grad.isfinite().all()


def test_a_norm_of_a_vector_and_a_keyword_of_another_name():
    class Named(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(D, D), ill_norm(), Named(D, D)

        def forward(self, x):
            return self.b(x=self.norm(self.a(x)))

    model, x = Model(), torch.randn(D)
    y, grads = results(model, x)
    lomem.convert(model, batch())
    for value in (x, batch()):
        y2, grads2 = results(model, value)
    y2, grads2 = results(model, x)
    torch.testing.assert_close(y, y2)
    assert distance(grads2, grads) < 1e-6


def test_hooks_that_change_a_norms_output():
    def in_place(module, args, output):
        return output.mul_(2)

    def replaced(module, args, output):
        return output * 2

    model, x = make(depth=1), batch()
    handle = model[1].norm.register_forward_hook(in_place)
    report = lomem.convert(model, x)
    assert next(d for d in report.left if d.kind == "norm").reason.startswith("its output is changed in place by mul_")
    lomem.restore(model)
    handle.remove()
    model[1].norm.register_forward_hook(replaced)
    y, grads = results(model, x)
    report = lomem.convert(model, x, activations="keep", dry_run=True)
    assert sum(d.saved_bytes for d in report.decisions) == 0  # the linear layers save what the hook returned
    del y, grads
