"""lomem.integrations: training by trl's SFTTrainer with and without the callback, of a tiny model and tokenizer."""

import random

import lomem
import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from lomem.integrations import TrainerCallback
from test_integrations import LENGTH, SIZES, WORDS
from tokenizers import Tokenizer, models, pre_tokenizers

pytestmark = pytest.mark.usefixtures("one_thread")

SPECIAL = ["<pad>", "<eos>", "<unk>"]
VOCABULARY = [*SPECIAL, *(f"w{i}" for i in range(WORDS - len(SPECIAL)))]


def tokenizer():
    model = models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    known = Tokenizer(model)
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "unk")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=known, **names)


def texts():
    """Of different lengths, so that batches are padded."""
    draw = random.Random(0)
    words = VOCABULARY[len(SPECIAL) :]
    return Dataset.from_dict({"text": [" ".join(draw.choices(words, k=draw.randrange(4, LENGTH))) for _ in range(24)]})


def trained(callbacks, folder, **options):
    """The trainer after six steps, and its losses."""
    transformers.set_seed(0)
    config = transformers.LlamaConfig(**SIZES, pad_token_id=0, eos_token_id=1, use_cache=False)
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        max_length=LENGTH,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = trl.SFTTrainer(
        model=transformers.LlamaForCausalLM(config),
        args=arguments,
        train_dataset=texts(),
        processing_class=tokenizer(),
        peft_config=peft.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear"),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def saved_bytes(trainer):
    model = trainer.model.train()
    ids = torch.ones(2, LENGTH, dtype=torch.int64)
    with lomem.memory.saved_for_backward([*model.parameters(), ids]) as saved:
        model(input_ids=ids, labels=ids)
    return saved.nbytes


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_the_same_and_saves_less(checkpointing, bf16, tmp_path):
    options = {"gradient_checkpointing": checkpointing, "bf16": bf16}
    plain, want = trained([], tmp_path, **options)
    callback = TrainerCallback(bits=16, verbose=False)
    trainer, got = trained([callback], tmp_path, **options)
    assert len(want) == 6
    # As in test_integrations.py: roundings of float32, which AdamW magnifies; of bfloat16, averaged over some tokens.
    assert got == pytest.approx(want, rel=2e-3 if bf16 else 3e-5)
    assert {"norm", "activation", "dropout", "copy"} <= {decision.kind for decision in callback.report.converted}
    assert callback.report.saved_after < callback.report.saved_before
    if not checkpointing:
        assert saved_bytes(trainer) < 0.8 * saved_bytes(plain)
