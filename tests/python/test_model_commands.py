"""The commands `lomem memory` and `lomem convert`."""

import dataclasses
import json
import warnings
from pathlib import Path

import lomem
import pytest
import torch
import transformers
from lomem.commands import model as model_commands
from lomem.commands import presets
from lomem.commands.cli import main
from lomem.memory import estimate, step_peak

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers, about names that peft uses
]


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")  # tables without broken lines


def test_memory_of_a_config(config, tmp_path, capsys):
    files = {kind: tmp_path / f"memory.{kind}" for kind in ("json", "md", "png")}
    command = ["memory", "--model", config, "--method", "plain,activations,norms,lomem,checkpoint,lomem+checkpoint"]
    command += ["--batch", "4", "--seq", "24", "--lora", "r=4,targets=all", "--device", "cpu"]
    options = [f"--json={files['json']}", f"--table={files['md']}", f"--plot={files['png']}"]
    assert main([*command, *options]) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM, LoRA all linears r4 in fp32" in printed
    written = json.loads(files["json"].read_text())
    assert list(written["estimates"]) == command[4].split(",")
    saved = {method: report["saved_bytes"] for method, report in written["estimates"].items()}
    assert saved["lomem"] < min(saved["activations"], saved["norms"])
    assert max(saved["activations"], saved["norms"]) < saved["plain"]
    # What is recomputed is not kept, converted or not.
    assert saved["checkpoint"] == saved["lomem+checkpoint"] < saved["lomem"]
    assert files["md"].read_text().count("\n| ") == 2
    assert files["png"].stat().st_size > 0
    # The same through the functions.
    preset = presets.from_config(config)
    setting = presets.Setting("", presets.Lora(4, "all"))
    report = estimate(
        lambda: presets.build(setting, preset), lambda: preset.batch(4, 24), torch.optim.AdamW, device="cpu"
    )
    assert written["estimates"]["plain"]["peak"]["nbytes"] == report.peak.nbytes
    assert saved["plain"] == report.saved_bytes


def test_convert_of_a_config(config, capsys):
    assert main(["convert", "--dry-run", "--model", config, "--every"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("inverted") == 5
    assert "7 converted, 0 left" in printed
    assert main(["convert", "--dry-run", "--model", config, "--lora", "r=2,targets=qv"]) == 0
    # LoRA beside q and v keeps the output of the norm before them; the frozen layers behind the others keep nothing.
    assert "no consumer saves its output: the weight of Linear is frozen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memory"], "--model is missing, expected one of vit-b, vit-l"),
        (["memory", "--model", "gpt-5"], "--model is gpt-5, expected one of vit-b, vit-l"),
        (["memory", "--model", "."], ". is not a transformers config"),
        (
            ["memory", "--model", "CONFIG", "--method", "magic"],
            "--method is magic, expected some of plain, activations",
        ),
        (["memory", "--model", "CONFIG", "--lora", "64"], "--lora: got 64, expected r=64 and optionally"),
        (["memory", "--model", "CONFIG", "--lora", "r=0"], "--lora: got r=0, expected r of at least 1"),
        (["memory", "--model", "CONFIG", "--4bit"], "--4bit is given without --lora"),
        (["memory", "--model", "CONFIG", "--no-peft-cast"], "--no-peft-cast is given without --lora"),
        (["memory", "--model", "CONFIG", "--json", "/nowhere/x.json"], "--json is /nowhere/x.json, expected a file in"),
        (["memory", "--model", "CONFIG", "--plot", "x.docx"], "--plot is x.docx, expected a file name that ends in"),
        (["memory", "--paper", "--only", "gpt-5"], "--only is gpt-5, expected some of vit-b"),
        (["memory", "--model", "vit-b", "--seq", "3"], "seq_len is 3, expected None: images have the config's size"),
        (["convert", "--dry-run", "--model", "gpt-5"], "--model is gpt-5, expected one of vit-b"),
        (["convert", "--dry-run"], "--model is missing"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, message, config, capsys):
    assert main([config if a == "CONFIG" else a for a in arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith(f"lomem {arguments[0]}: {message}"), error


def test_a_model_that_does_not_run_is_one_sentence(tmp_path, capsys):
    config = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    transformers.T5Config(**config, architectures=["T5ForSequenceClassification"]).save_pretrained(tmp_path)
    for command in (["memory"], ["convert", "--dry-run"]):
        assert main([*command, "--model", str(tmp_path)]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"lomem {command[0]}: T5ForSequenceClassification, full fine-tuning does not run: ")


def test_a_config_of_another_kind_is_refused(tmp_path):
    transformers.LlamaConfig(architectures=["LlamaModel"]).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"architectures is \['LlamaModel'\], expected a class of transformers that ends in"
    ):
        presets.from_config(str(tmp_path))


SMALL = {
    "full": presets.Setting("vit-b"),
    "lora": presets.Setting("roberta-base", presets.Lora(4, "all")),
    "4bit": presets.Setting("llama-7b", presets.Lora(4, "all", dtype=torch.bfloat16), four_bit=True),
}


def test_the_papers_table(monkeypatch, tmp_path, capsys):
    small = {name: preset.small() for name, preset in presets.PRESETS.items()}
    monkeypatch.setattr(presets, "SETTINGS", tuple(SMALL.values()))
    monkeypatch.setattr(presets, "get", small.__getitem__)
    files = {kind: tmp_path / f"paper.{kind}" for kind in ("json", "md", "png")}
    options = [f"--json={files['json']}", f"--table={files['md']}", f"--plot={files['png']}"]
    assert main(["memory", "--paper", *options]) == 0
    rows = json.loads(files["json"].read_text())["settings"]
    assert [row["setting"] for row in rows] == [str(setting) for setting in SMALL.values()]
    full, lora, four_bit = (row["estimates"] for row in rows)
    methods = ["plain", "activations", "norms", "lomem", "exact", "8bit", "one-cast", "checkpoint"]
    assert list(full) == methods
    assert list(lora) == [*methods[:4], "no peft cast", *methods[4:]]
    assert list(four_bit) == [*methods[:6], "gated-mlp", "checkpoint"]
    for reports in (full, lora, four_bit):
        saved = {method: report["saved_bytes"] for method, report in reports.items()}
        gains = [saved["plain"] - saved[method] for method in ("activations", "norms", "lomem")]
        # The parts add up; of the model with dropout, this and copies for adapters come on top.
        assert gains[2] > gains[0] + gains[1] if reports is lora else gains[2] == gains[0] + gains[1]
        assert gains[0] > 0
        assert gains[1] > 0
    # One cast in place of three is part of what the norms gain.
    assert full["norms"]["saved_bytes"] < full["one-cast"]["saved_bytes"] < full["plain"]["saved_bytes"]
    assert lora["no peft cast"]["saved_bytes"] < lora["lomem"]["saved_bytes"]
    assert files["md"].read_text().count("\n| ") == 1 + 3
    assert files["png"].stat().st_size > 0
    assert "Saved for backward" in capsys.readouterr().out


ROOT = Path(__file__).resolve().parents[2]
#: The rows of README.md's table, and their settings.
README_ROWS = {
    "ViT-B, full fine-tuning, batch 64, AMP": "vit-b, full fine-tuning, AMP bf16",
    "RoBERTa-base, full fine-tuning, 32 x 128, AMP": "roberta-base, full fine-tuning, AMP bf16",
    "RoBERTa-base, LoRA r64 with dropout 0.1, AMP": "roberta-base, LoRA all linears r64, dropout 0.1 in fp32, AMP bf16",
    "LLaMA-7B in 4 bits, LoRA r64 in bf16, 4 x 512": "llama-7b, 4-bit base, LoRA all linears r64 in bf16",
    "the same with dropout 0.1": "llama-7b, 4-bit base, LoRA all linears r64, dropout 0.1 in bf16",
    "the same without dropout, LoRA in fp32": "llama-7b, 4-bit base, LoRA all linears r64 in fp32",
}
README_COLUMNS = {"plain": "plain", "converted": "lomem", "`bits=8`": "8bit", "checkpointing": "checkpoint"}


def rows_of(text):
    """The cells of a table in Markdown, by the names of its rows and columns."""
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def test_the_committed_estimates():
    """The tables of the results and of README.md are those of the figures."""
    results = json.loads((ROOT / "benchmarks/results/paper-memory.json").read_text(encoding="utf-8"))["settings"]
    assert [row["setting"] for row in results] == [str(setting) for setting in presets.SETTINGS]
    table = rows_of((ROOT / "benchmarks/results/paper-memory.md").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    start = readme.index("Estimates of `lomem memory --paper`")
    short = rows_of(readme[start : readme.index("Checkpointing saves", start)])
    assert list(short) == list(README_ROWS)
    assert all(list(cells)[1:] == list(README_COLUMNS) for cells in short.values())

    def mib(nbytes):
        return f"{nbytes / 2**20:,.0f}"

    for row in results:
        estimates, name = row["estimates"], row["setting"]
        plain = [estimates["plain"]["saved_bytes"], estimates["plain"]["forward_backward"]["nbytes"]]
        for method, values in estimates.items():
            figures = [values["saved_bytes"], values["forward_backward"]["nbytes"]]
            cell = f"{mib(figures[0])} / {mib(figures[1])}"
            if method != "plain":
                changes = [f"{100 * a / b - 100:+.0f}" for a, b in zip(figures, plain, strict=True)]
                cell += f" ({' / '.join(changes)} %)"
            column = model_commands._PAPER_NAMES[method]
            assert table[name][column] == cell
            for title, setting in README_ROWS.items():
                for heading, of in README_COLUMNS.items():
                    if (setting, of) == (name, method):
                        assert short[title][heading] in (cell, cell.split(" (")[0])


def everything(report):
    values = report.to_dict()
    del values["source"]
    return values


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("method", ["plain", "lomem", "exact", "checkpoint"])
@pytest.mark.parametrize("lora", [None, presets.Lora(4, "all", dropout=0.1)], ids=["full", "lora"])
def test_the_estimate_is_the_real_count_to_the_byte(name, method, lora):
    preset = presets.get(name).small()
    setting = presets.Setting(name, lora, four_bit=lora is not None and preset.family.head is None)
    subject = model_commands.Subject(
        "", lambda: presets.build(setting, preset), preset.batch, preset.seq_len is not None, preset.autocast
    )
    estimated = estimate(
        subject.build,
        lambda: preset.batch(),
        torch.optim.AdamW,
        device="cpu",
        autocast=preset.autocast,
        transform=lambda model: model_commands.apply(method, model, subject) and None,
    )
    torch.manual_seed(0)
    model = subject.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = model_commands.apply(method, model, subject)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    real = step_peak(model, preset.batch(), optimizer, autocast=preset.autocast)
    assert everything(estimated) == everything(real)
    assert (report is not None) == (method in ("lomem", "exact"))
    if report is not None:
        lomem.restore(model)


def test_a_subject_of_another_dtype():
    preset = dataclasses.replace(presets.get("vit-b").small(), dtype=torch.bfloat16, autocast=None)
    assert {p.dtype for p in presets.build(presets.Setting("vit-b"), preset).parameters()} == {torch.bfloat16}
