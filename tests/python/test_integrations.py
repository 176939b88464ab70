"""lomem.integrations: training by transformers' Trainer with and without the callback, of tiny models."""

import functools
import random
import subprocess
import sys

import lomem
import numpy
import peft
import pytest
import torch
import transformers
from lomem.conversion.exchange import is_converted
from lomem.integrations import TrainerCallback
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS, LENGTH, ROWS = 50, 12, 22
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
}


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)  # (with dropout of 0.1)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, use_cache=False))


def llama_with_lora():
    options = {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return peft.get_peft_model(llama(), peft.LoraConfig(**options))


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


class Net(nn.Module):
    """A model that is not of transformers, with statistics that one row does not have."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.up = nn.Embedding(WORDS, 32), nn.LayerNorm(32), nn.Linear(32, 64)
        # (The gradient of a bias in front of batch norm is 0 but for rounding, which AdamW would blow up.)
        self.act, self.down, self.batch = nn.GELU(), nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        x = (x + self.down(self.act(self.up(self.norm(x))))).mean(1)
        return {"loss": self.batch(x).square().sum(-1).sub(labels[:, 0]).square().mean()}


class Rows(Dataset):
    """Rows that are drawn anew whenever they are asked for, from all global generators."""

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        numbers = [index % WORDS, random.randrange(WORDS), int(numpy.random.randint(WORDS))]  # noqa: NPY002
        numbers += torch.randint(0, WORDS, (LENGTH - 3,)).tolist()
        return {"input_ids": numbers, "labels": numbers}


class Stream(IterableDataset):
    def __iter__(self):
        return (Rows()[index] for index in range(ROWS))


class Noise:
    """A collator with a generator of its own."""

    def __init__(self, model):
        self.generator, self.model = torch.Generator().manual_seed(1), model

    def __call__(self, rows):
        batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        batch["labels"] = torch.where(torch.rand(LENGTH, generator=self.generator) < 0.8, batch["labels"], -100)
        return batch


class Recorder(Trainer):
    """Keeps losses and batches."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses, self.batches = [], []

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.batches.append(inputs["input_ids"].clone())
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.losses.append(loss.item() if torch.is_tensor(loss) else loss[0].item())
        return loss


def trained(make, callbacks, folder, data=Rows, collator=transformers.default_data_collator, resume=None, **options):
    """A trainer that has trained a model for six steps."""
    transformers.set_seed(0)
    model = make()
    options = {"max_steps": 6, "save_strategy": "no", "per_device_train_batch_size": 4, **options}
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=1e-4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Recorder(
        model, arguments, train_dataset=data(), eval_dataset=Rows(), data_collator=collator, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def saved_bytes(trainer):
    model = trainer.model.train()
    batch = trainer.batches[-1]
    with lomem.memory.saved_for_backward([*model.parameters(), batch]) as saved:
        model(input_ids=batch, labels=batch)
    return saved.nbytes


def assert_the_same_training(got, want, exact):
    assert len(got.batches) == len(want.batches)
    assert all(map(torch.equal, got.batches, want.batches))
    # The forward pass of exact norms may be rounded differently, by some units in the last of 24 bits.
    assert got.losses[0] == pytest.approx(want.losses[0], rel=1e-6)
    # Gradients are exact to rounding as well, which AdamW and batch norm magnify. Codes of 4 bits add noise of a few
    # percent of a step, none of which moves a weight by more than about 1e-4.
    assert got.losses == pytest.approx(want.losses, rel=3e-5 if exact else 1e-3)


MODELS = [gpt2, llama, llama_with_lora, bert, Net]


@pytest.mark.parametrize("make", MODELS)
def test_training_is_the_same_and_saves_less(make, tmp_path):
    want = trained(make, [], tmp_path)
    callback = TrainerCallback(bits=16, verbose=False)
    got = trained(make, [callback], tmp_path)
    assert_the_same_training(got, want, exact=True)
    assert callback.report.converted
    assert callback.report.saved_after < callback.report.saved_before
    assert saved_bytes(got) < saved_bytes(want)


def test_the_default_options(tmp_path):
    callback = TrainerCallback(verbose=False)
    got = trained(bert, [callback], tmp_path)
    assert_the_same_training(got, trained(bert, [], tmp_path), exact=False)
    assert {"4bit", "exact"} <= {decision.action for decision in callback.report.decisions}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", [Rows, Stream])
def test_random_numbers_and_the_order_of_data_are_the_same(data, workers, tmp_path):
    """Those of every generator there is: rows, the collator and the model's dropout draw."""
    trainers = []
    for callbacks in ([], [TrainerCallback(bits=16, verbose=False)]):
        model = gpt2()
        options = {"data": data, "collator": Noise(model), "dataloader_num_workers": workers}
        trainers.append(trained(gpt2, callbacks, tmp_path, **options))
        trainers[-1].drawn = (random.random(), float(numpy.random.rand()), float(torch.rand(())))  # noqa: NPY002
    want, got = trainers
    assert_the_same_training(got, want, exact=True)
    assert got.drawn == want.drawn


class Once(Stream):
    def __init__(self):
        self.rows = super().__iter__()

    def __iter__(self):
        return self.rows


def test_data_that_are_there_once(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"^lomem\.integrations\.TrainerCallback: the data can be iterated over only once, expected example_in",
    ):
        trained(gpt2, [TrainerCallback(bits=16)], tmp_path, data=Once)
    ids = torch.ones(1, LENGTH, dtype=torch.int64)
    callback = TrainerCallback({"input_ids": ids, "labels": ids}, bits=16, verbose=False)
    got = trained(gpt2, [callback], tmp_path, data=Once)
    assert_the_same_training(got, trained(gpt2, [], tmp_path, data=Once), exact=True)
    assert callback.report.converted


def test_autocast(tmp_path):
    """Norms emit bfloat16, which q, k and v share: that is decided under autocast alone."""
    callback = TrainerCallback(bits=16, verbose=False)
    got = trained(llama, [callback], tmp_path, bf16=True)
    want = trained(llama, [], tmp_path, bf16=True)
    model = llama()
    ids = torch.ones(2, LENGTH, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        report = lomem.convert(model, {"input_ids": ids, "labels": ids}, bits=16)
    assert [d.action for d in callback.report.decisions] == [d.action for d in report.decisions]
    assert saved_bytes(got) < saved_bytes(want)
    # bfloat16 has 8 bits, of which the mean over 44 tokens averages most away.
    assert got.losses == pytest.approx(want.losses, rel=2e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    callback = TrainerCallback(bits=16, verbose=False)
    got = trained(llama, [callback], tmp_path, **options)
    assert_the_same_training(got, trained(llama, [], tmp_path), exact=True)
    assert callback.report.converted


def test_compiled(tmp_path, monkeypatch):
    """What is compiled is the converted model: the first step comes after the callback."""
    compiled = []

    def backend(graph, inputs):
        compiled.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    # (accelerate takes no backend but those that it knows.)
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "eager", backend)
    torch._dynamo.reset()
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    got = trained(llama, [TrainerCallback(bits=16, verbose=False)], tmp_path, **options)
    assert any("ms_rms_norm" in name for names in compiled for name in names)
    assert_the_same_training(got, trained(llama, [], tmp_path), exact=True)


def test_evaluation(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "max_steps": 2}
    runs = [trained(gpt2, callbacks, tmp_path, **options) for callbacks in ([], [TrainerCallback(bits=16)])]
    want, got = ([log["eval_loss"] for log in run.state.log_history if "eval_loss" in log] for run in runs)
    assert len(want) == 2
    assert got == pytest.approx(want, rel=3e-5)  # as in assert_the_same_training
    assert not runs[1].model.training


def test_training_resumes(tmp_path):
    """With the weights of the checkpoint, and the data and random numbers that come next."""
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = trained(gpt2, [TrainerCallback(bits=16, verbose=False)], tmp_path / "whole", **options)
    callback = TrainerCallback(bits=16, verbose=False)
    folder = str(tmp_path / "whole/checkpoint-3")
    rest = trained(gpt2, [callback], tmp_path / "rest", resume=folder)
    assert callback.report.converted
    assert len(rest.losses) == 3
    # Rows are drawn when they are skipped as well, so these batches are others: what is compared is a plain run.
    plain = trained(gpt2, [], tmp_path / "plain", resume=folder)
    assert_the_same_training(rest, plain, exact=True)
    state = transformers.GPT2LMHeadModel.from_pretrained(str(tmp_path / "whole/checkpoint-6")).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.model.state_dict().items())


def test_a_converted_model_is_left_alone(tmp_path, capsys):
    callback = TrainerCallback(bits=16)
    trainer = trained(gpt2, [callback], tmp_path)
    report, classes = callback.report, [type(module) for module in trainer.model.modules()]
    assert str(report) in capsys.readouterr().out
    trainer.train()
    assert callback.report is report
    assert [type(module) for module in trainer.model.modules()] == classes
    assert any(map(is_converted, trainer.model.modules()))
    assert str(report) not in capsys.readouterr().out
    assert len(trainer.losses) == 12


def test_options(tmp_path):
    callback = TrainerCallback(bits=16, exclude=["transformer.h.0.*"], dry_run=True, verbose=False)
    trainer = trained(gpt2, [callback], tmp_path, max_steps=1)
    assert not any(map(is_converted, trainer.model.modules()))
    assert callback.report.converted
    assert not any(d.name.startswith("transformer.h.0.") for d in callback.report.converted)
    with pytest.raises(
        TypeError, match=r"^lomem\.integrations\.TrainerCallback: got bit, expected options of lomem\.convert: activ"
    ):
        TrainerCallback(bit=16)


def test_a_sharded_model_is_refused(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = llama()
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
        call = functools.partial(TrainerCallback().on_train_begin, arguments, None, None, train_dataloader=None)
        with pytest.raises(
            ValueError,
            match=r"^lomem\.integrations\.TrainerCallback: the model is sharded by FSDP already when training begins, ",
        ):
            call(model=model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "modules", "package"),
    [
        ("TrainerCallback", ["transformers"], "transformers[torch]"),
        ("LightningCallback", ["lightning", "pytorch_lightning"], "lightning"),
    ],
)
def test_without_the_package(name, modules, package):
    """lomem itself needs none; the callback says what to install."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({modules})); import lomem\n"
        f"try: lomem.integrations.{name}\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.startswith(f"lomem.integrations.{name}: got an ImportError (")
    assert result.stdout.endswith(f"), expected the package: pip install '{package}'\n")


def test_other_names():
    with pytest.raises(AttributeError, match=r"^module 'lomem\.integrations' has no attribute 'Callback'$"):
        lomem.integrations.Callback  # noqa: B018
