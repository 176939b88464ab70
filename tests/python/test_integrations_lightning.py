"""lomem.integrations: training by Lightning's Trainer with and without the callback."""

import random

import lightning
import lomem
import numpy
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import SingleDeviceStrategy
from lomem.conversion.exchange import is_converted
from lomem.integrations import LightningCallback
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

pytestmark = pytest.mark.usefixtures("one_thread")

D, ROWS = 32, 26


class Rows(Dataset):
    """Inputs and labels that are drawn anew whenever they are asked for."""

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return torch.randn(D) + random.random(), int(numpy.random.randint(4))  # noqa: NPY002


class Named(Rows):
    def __getitem__(self, index):
        x, label = super().__getitem__(index)
        return {"x": x, "label": label}


class Stream(IterableDataset):
    def __iter__(self):
        return (Rows()[index] for index in range(ROWS))


class Once(Stream):
    def __init__(self):
        self.rows = super().__iter__()

    def __iter__(self):
        return self.rows


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(D), nn.Linear(D, 64), nn.GELU()
        self.drop, self.down, self.batch = nn.Dropout(0.1), nn.Linear(64, 4, bias=False), nn.BatchNorm1d(4)

    def forward(self, x, label=None):
        logits = self.batch(self.down(self.drop(self.act(self.up(self.norm(x))))))
        return logits if label is None else F.cross_entropy(logits, label)


class Module(lightning.LightningModule):
    """Takes pairs, and has a forward pass."""

    def __init__(self):
        super().__init__()
        self.model, self.losses, self.seen = Net(), [], []

    def forward(self, x):
        return self.model(x)

    def step(self, batch):
        return batch[0], F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, index):
        x, loss = self.step(batch)
        self.log("loss", loss)
        self.seen.append(x.clone())
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.log("validation", self.step(batch)[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class WithoutForward(Module):
    """Takes mappings, and has none."""

    forward = lightning.LightningModule.forward

    def step(self, batch):
        return batch["x"], self.model(**batch)


def trained(callbacks, make=Module, data=Rows, steps=6, resume=None, validation=None, module=None, **options):
    """A module that has been trained, with its trainer."""
    lightning.seed_everything(0, verbose=False)
    module = make() if module is None else module
    options = {"enable_checkpointing": False, "limit_val_batches": 2, **options}
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **options,
    )
    rows = data() if isinstance(data, type) else data
    loader = DataLoader(rows, 4, shuffle=not isinstance(rows, IterableDataset))
    trainer.fit(module, loader, validation, ckpt_path=resume, weights_only=False if resume else None)
    return module


def assert_the_same_training(got, want):
    assert len(got.seen) == len(want.seen) > 0
    assert all(map(torch.equal, got.seen, want.seen))
    # The norm is rounded once, torch's in two steps: some units in the last of 24 bits.
    assert got.losses[0] == pytest.approx(want.losses[0], rel=1e-6)
    # Gradients are exact to rounding as well, which AdamW and batch norm magnify.
    assert got.losses == pytest.approx(want.losses, rel=3e-5)


def saved_bytes(module):
    x = module.seen[-1]
    with lomem.memory.saved_for_backward([*module.parameters(), x]) as saved:
        module.model.train()(x)
    return saved.nbytes


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("make", "data", "part"),
    [(Module, Rows, ""), (Module, Stream, ""), (WithoutForward, Named, "model")],
)
def test_training_is_the_same_and_saves_less(make, data, part, precision):
    want = trained([], make, data, precision=precision)
    drawn = random.random(), float(numpy.random.rand()), float(torch.rand(()))  # noqa: NPY002
    callback = LightningCallback(part=part, bits=16, verbose=False)
    got = trained([callback], make, data, precision=precision)
    if precision == "32-true":
        assert_the_same_training(got, want)
    else:
        assert all(map(torch.equal, got.seen, want.seen))
        # Numbers of bfloat16 have 8 bits.
        assert got.losses == pytest.approx(want.losses, rel=2**-8)
    assert (random.random(), float(numpy.random.rand()), float(torch.rand(()))) == drawn  # noqa: NPY002
    names = [decision.name for decision in callback.report.converted]
    assert sorted(names) == [f"model.{name}" if part == "" else name for name in ("act", "drop", "norm")]
    assert saved_bytes(got) < saved_bytes(want)


def test_validation_comes_before_and_after():
    runs = []
    for callbacks in ([], [LightningCallback(bits=16, verbose=False)]):
        validation = DataLoader([(torch.ones(D), 1)] * 8, 4)
        module = trained(callbacks, validation=validation, val_check_interval=3)
        runs.append((module, float(module.trainer.callback_metrics["validation"])))
    assert_the_same_training(runs[1][0], runs[0][0])
    assert runs[1][1] == pytest.approx(runs[0][1], rel=3e-5)  # as in assert_the_same_training


def test_training_resumes(tmp_path):
    whole = trained([LightningCallback(bits=16, verbose=False)], steps=3)
    whole.trainer.save_checkpoint(tmp_path / "three.ckpt")
    callback = LightningCallback(bits=16, verbose=False)
    rest = trained([callback], resume=tmp_path / "three.ckpt")
    plain = trained([], resume=tmp_path / "three.ckpt")
    assert len(rest.losses) == 3
    assert callback.report.converted
    assert_the_same_training(rest, plain)


def test_a_converted_module_is_left_alone(capsys):
    callback = LightningCallback(bits=16)
    module = trained([callback])
    report, classes = callback.report, [type(part) for part in module.modules()]
    assert any(map(is_converted, module.modules()))
    assert str(report) in capsys.readouterr().out
    trained([callback], module=module)
    assert callback.report is report
    assert [type(part) for part in module.modules()] == classes
    assert str(report) not in capsys.readouterr().out
    assert len(module.losses) == 12


def test_what_cannot_be_read():
    name = r"^lomem\.integrations\.LightningCallback: "
    with pytest.raises(ValueError, match=name + "the data can be iterated over only once, expected example_inputs"):
        trained([LightningCallback(bits=16)], data=Once)
    callback = LightningCallback(torch.randn(2, D), bits=16, verbose=False)
    assert_the_same_training(trained([callback], data=Once), trained([], data=Once))
    assert callback.report.converted
    trainer = lightning.Trainer(callbacks=[LightningCallback(bits=16)], logger=False, enable_checkpointing=False)
    loaders = {"a": DataLoader(Rows(), 4), "b": DataLoader(Rows(), 4)}
    with pytest.raises(ValueError, match=name + "the training data are in a dict, expected a DataLoader, or example_"):
        trainer.fit(Module(), loaders)


def test_what_is_compiled_or_sharded_already(tmp_path):
    name = r"^lomem\.integrations\.LightningCallback: the m\w+ is "
    with pytest.raises(ValueError, match=name + "compiled already when training begins, expected one that is not"):
        trained([LightningCallback(bits=16)], module=torch.compile(Module(), backend="eager"))
    from torch.distributed.fsdp import fully_shard

    class Sharding(SingleDeviceStrategy):
        def setup(self, trainer):
            fully_shard(self.model.model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
            super().setup(trainer)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=name + "sharded by FSDP already when training begins, expected one that"):
            trained([LightningCallback(bits=16)], strategy=Sharding("cpu"))
    finally:
        torch.distributed.destroy_process_group()


def test_unknown_options():
    with pytest.raises(
        TypeError, match=r"^lomem\.integrations\.LightningCallback: got bit, expected options of lomem\.convert: activ"
    ):
        LightningCallback(bit=16)
