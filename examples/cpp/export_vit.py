"""Trains a small Vision Transformer on digits with lomem, and compiles it ahead of time for classify_digits.cpp.

    python export_vit.py digits.pt2

The model is converted for training. In eval mode without gradients its modules are the original ones, so that the
package needs torch alone. Needs transformers, and a C++ compiler.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import lomem
import torch
import transformers
from torch import Tensor, nn

DIGITS = Path(__file__).parents[1] / "data" / "digits.csv"
EPOCHS, BATCH = 12, 64


class Classifier(nn.Module):
    """A Vision Transformer of images of 8 x 8 pixels, whose patches are 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.ViTConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=10,
            initializer_range=0.1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.vit = transformers.ViTForImageClassification(config)

    def forward(self, images: Tensor) -> Any:
        """Logits of images of shape ``(n, 1, 8, 8)``."""
        return self.vit(pixel_values=images).logits


def digits() -> tuple[Tensor, Tensor]:
    """Images with pixels from 0 to 1, and labels."""
    with DIGITS.open(encoding="utf-8", newline="") as file:
        rows = [[float(value) for value in row] for row in csv.reader(line for line in file if line[0] != "#")]
    table = torch.tensor(rows)
    return table[:, :-1].view(-1, 1, 8, 8) / 16, table[:, -1].long()


def main(package: str) -> None:
    """Trains, says how many of the last fifth of the digits are right, and writes the package."""
    torch.manual_seed(0)
    images, labels = digits()
    split = len(labels) * 4 // 5
    model = Classifier().train()
    print(lomem.convert(model, images[:BATCH]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for index in torch.randperm(split).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()

    model.eval()
    test = images[split:]
    with torch.no_grad():
        right = (model(test).argmax(1) == labels[split:]).sum().item()
        batch = torch.export.Dim("batch", min=2, max=4096)
        program = torch.export.export(model, (test,), dynamic_shapes=({0: batch},))
        torch._inductor.aoti_compile_and_package(program, package_path=package)
    print(f"{right} of {len(test)} digits are classified correctly.")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "digits.pt2")
