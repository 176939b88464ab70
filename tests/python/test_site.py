"""The site: its navigation, and what its pages say of the library, its sources and its figures."""

import contextlib
import io
import json
import re
import subprocess
import sys

import lomem
import lomem.functional as LF
import pytest
import torch
import without_lomem
import yaml
from test_contributing import FILES, FOLDERS, ROOT, check_command
from torch import nn

pytest.importorskip("rich")  # of lomem.commands.bench, which whole_step imports
sys.path.insert(0, str(ROOT / "benchmarks"))

import liger_bytes
import whole_step
from bytes_alive import bytes_alive

DOCS = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").glob("**/*.md"))
#: Pages whose consoles hold nothing but commands of this repository.
CHECKED = ["adding-an-op.md", "choosing.md", "faq.md", "getting-started.md", "index.md", "limits.md"]


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def entries(nav):
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from entries(item)


NAV = list(entries(yaml.safe_load(read("mkdocs.yml"))["nav"]))


# The navigation


def test_every_document_is_in_the_navigation_once():
    assert sorted(entry for entry in NAV if not entry.startswith(("api/", "repository/"))) == DOCS
    assert len(set(NAV)) == len(NAV)


def test_the_other_entries_are_public_modules_and_files():
    modules = [entry.removeprefix("api/").removesuffix(".md") for entry in NAV if entry.startswith("api/")]
    files = [entry.removeprefix("repository/") for entry in NAV if entry.startswith("repository/")]
    assert len(modules) + len(files) + len(DOCS) == len(NAV)
    assert files == ["CHANGELOG.md"]
    assert set(files) <= set(FILES)
    # All that lomem exports as modules, lomem.fit, which it imports late, and what lomem.convert returns.
    submodules = {f"lomem.{name}" for name in lomem.__all__ if type(getattr(lomem, name)) is type(lomem)}
    assert set(modules) == {"lomem", "lomem.conversion", "lomem.fit", *submodules}


def test_the_site_is_built_with_warnings_as_errors():
    config = yaml.safe_load(read("mkdocs.yml"))
    assert config["validation"] == {
        "nav": dict.fromkeys(("omitted_files", "not_found", "absolute_links"), "warn"),
        "links": dict.fromkeys(("not_found", "anchors", "absolute_links", "unrecognized_links"), "warn"),
    }
    recipe = re.search(r"^docs:.*\n(\t.*\n)+", read("Makefile"), re.MULTILINE)[0]
    # (With --quiet, warnings would not be counted.)
    assert recipe.endswith("mkdocs build --strict\n")
    assert "make docs\n" in read(".ci/run")


def test_the_environment_of_the_site_brings_no_torch():
    line = re.search(r"^docs = \[(.*)\]$", read("pyproject.toml"), re.MULTILINE)[1]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in re.findall(r'"([^"]+)"', line)}
    assert names == {"latex2mathml", "mkdocs-material", "mkdocstrings", "ruff"}


# What pages link to and name


def anchors(text):
    """The anchors of headings, as the forge and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"\s", "-", heading) for heading in plain}


@pytest.mark.parametrize("document", [f"docs/{name}" for name in DOCS] + ["README.md"])
def test_links_lead_somewhere_in_the_repository(document):
    text = re.sub(r"^```.*?^```$", "", read(document), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        target = target.resolve().relative_to(ROOT).as_posix()
        assert target in FILES or target in FOLDERS, f"{document}: {link}"
        if anchor:
            assert anchor in anchors(read(target)), f"{document}: {link}"


@pytest.mark.parametrize("document", CHECKED)
def test_commands_are_there(document):
    text = read(f"docs/{document}")
    consoles = re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    typed = [line.removeprefix("$ ") for block in consoles for line in block.splitlines() if line.startswith("$ ")]
    inline = list(re.findall(r"`((?:lomem|make|python) [^`]+)`", text))
    for command in typed + inline:
        if not command.startswith(("pip install", "python -c")):
            check_command(command)


def test_the_readme_lists_the_documents():
    listed = re.findall(r"^- \[docs/([\w-]+\.md)\]\(docs/\1\)", read("README.md"), re.MULTILINE)
    assert sorted(listed) == [name for name in DOCS if name != "index.md"]


# Code


def blocks(document, languages):
    return re.findall(rf"^```(?:{languages})\n(.*?)^```$", read(document), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("docs/cpp.md", "cpp|cmake"))))
def test_programs_in_cpp_are_compiled_elsewhere(number):
    """Each is a part, line by line, of a file that the tests of C++ build."""
    block = blocks("docs/cpp.md", "cpp|cmake")[number]
    folders = ("examples/cpp/", "examples/cuda/", "tests/install/")
    assert any(block in read(path) for path in FILES if path.startswith(folders))


@pytest.mark.parametrize("document", ["getting-started.md"])
def test_printed_numbers(document):
    """What a comment behind a print promises is among the lines that are printed, in that order."""
    source = "\n".join(blocks(f"docs/{document}", "python"))
    promised = re.findall(r"^print\(.*\)  # (.+)$", source, re.MULTILINE)
    assert promised
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(source, document, "exec"), {})
    lines = iter(output.getvalue().splitlines())
    for text in promised:
        assert text in lines


# Limits


class TakesGradients(nn.Module):
    def forward(self, x):
        return torch.func.grad(lambda z: z.square().sum())(x)


def second_derivative():
    x = torch.randn(4, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(LF.ms_layer_norm(x, (8,)).square().sum(), x, create_graph=True)
    grad.square().sum().backward()


def changed_in_place():
    y = LF.ms_layer_norm(torch.randn(4, 8, requires_grad=True), (8,))
    y.add_(1)
    y.sum().backward()


def zero_weight():
    weight = torch.ones(8, requires_grad=True)
    weight.data[3] = 0
    LF.ms_layer_norm(torch.randn(4, 8), (8,), weight, torch.zeros(8))


def frozen_consumer():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    model[1].requires_grad_(False)
    lomem.convert(model, torch.randn(4, 8, requires_grad=True))


def restored_late():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    lomem.convert(model, torch.randn(4, 8))
    model[0].__class__ = type("Sharded", (type(model[0]),), {})
    lomem.restore(model)


#: What provokes each message of the page.
REFUSED = {
    "nothing to convert": lambda: lomem.convert(nn.Linear(3, 3), torch.randn(2, 3)),
    "frozen consumer": frozen_consumer,
    "second derivative": second_derivative,
    "torch.func.grad": lambda: torch.func.grad(lambda x: LF.gelu(x).sum())(torch.randn(3)),
    "forward mode": lambda: torch.func.jvp(LF.gelu, (torch.ones(3),), (torch.ones(3),)),
    "vmap": lambda: torch.vmap(lambda x: LF.dropout(x, 0.5))(torch.randn(2, 3)),
    "measured torch.func.grad": lambda: lomem.memory.profile(TakesGradients(), torch.randn(3)),
    "dtype": lambda: LF.gelu(torch.ones(3, dtype=torch.complex64)),
    "sparse": lambda: LF.ms_layer_norm(torch.eye(3).to_sparse(), (3,)),
    "nested": lambda: LF.ms_layer_norm(torch.nested.nested_tensor([torch.ones(3)]), (3,)),
    "code": lambda: LF.pack_bits(torch.tensor([4], dtype=torch.uint8), bits=2),
    "in place": changed_in_place,
    "zero weight": zero_weight,
    "restored late": restored_late,
    "script": lambda: torch.jit.script(lomem.nn.GELU()),
    "policy": lambda: lomem.checkpoint.policy(save=[torch.ops.aten.dropout]),
    "exported": lambda: without_lomem.refused("torch.export"),
    "traced": lambda: without_lomem.refused("torch.jit"),
    "packaged": lambda: without_lomem.refused("AOTInductor"),
}


@pytest.fixture(scope="module")
def messages():
    """The messages that the page of limits quotes: what is in backticks and reads as a sentence."""
    quoted = [" ".join(word.split()) for word in re.findall(r"`([^`]+)`", read("docs/limits.md"))]
    return [word for word in quoted if len(word.split()) > 4]


@pytest.mark.filterwarnings("ignore")  # of torch, about nested tensors and TorchScript
# (Compiling a package takes a third of a minute.)
@pytest.mark.parametrize("case", [pytest.param(n, marks=[pytest.mark.slow] * (n == "packaged")) for n in REFUSED])
def test_messages(case, messages):
    with pytest.raises(Exception) as error:  # noqa: PT011, each message is compared with the page
        REFUSED[case]()
    text = " ".join(str(error.value).split())
    assert [message for message in messages if message in text], text


def test_there_are_no_other_messages(messages):
    assert len(messages) == len(set(messages))
    report = lomem.convert(nn.Sequential(nn.LayerNorm(3), nn.GELU()))
    (left,) = report.left
    assert left.reason in messages
    assert len(messages) == 1 + len(REFUSED)


# Figures


def test_the_table_of_methods_is_that_of_the_results():
    counted, timed = (
        json.loads(read(f"benchmarks/results/{name}.json"))["cases"] for name in ("saved-by-method", "whole-step")
    )
    page = read("docs/choosing.md")
    assert list(counted) == whole_step.COUNTED_CASES
    for name, case in counted.items():
        assert "\n" + "\n".join(whole_step.counted_table(case, timed.get(name, {}))) + "\n\n" in page
    assert page.count("| method | saved") == len(counted)


def test_the_committed_bytes():
    contents = json.loads(read("benchmarks/results/saved-by-method.json"))
    assert read("benchmarks/results/saved-by-method.md") == whole_step.counted_markdown(contents)
    methods = {**whole_step.METHODS, **whole_step.MORE_METHODS}
    timed = json.loads(read("benchmarks/results/whole-step.json"))["cases"]
    for name, case in contents["cases"].items():
        saved = {method: result["saved_bytes"] for method, result in case["methods"].items()}
        assert list(saved) == [m for m in methods if whole_step.CASES[name].has(methods[m])]
        # The same models, whose bytes were also counted when they were run.
        for method in ("plain", "compile", "checkpointing"):
            assert saved[method] == timed[name]["methods"][method]["saved_bytes"]
        assert saved["every-second"] < saved["half"] < saved["plain"]
        assert saved["exact-compile"] < saved["compile"]
        assert saved["exact-budget"] < saved["budget"] < saved["compile"]
        assert saved["8bit"] < saved["exact"] < saved["plain"]
        # Hooks get all that is saved; what they copy is more than what was saved, since nothing is shared.
        for method in ("offload", "exact-offload"):
            assert saved[method] < saved["plain"] / 100
            assert case["methods"][method]["host_bytes"] > saved["plain"] / 2


def test_the_committed_bytes_of_liger():
    contents = json.loads(read("benchmarks/results/liger-bytes.json"))
    assert read("benchmarks/results/liger-bytes.md") == liger_bytes.markdown(contents)
    assert "\n" + "\n".join(liger_bytes.table(contents["saved"])) + "\n\n" in read("docs/choosing.md")
    for counts in contents["saved"].values():
        assert list(counts) == list(liger_bytes.liger_models.PATCHES)
        *others, everything = counts.values()
        assert len(set(everything)) == 1
        assert all(plain > exact > eight for plain, exact, eight in others)


def test_counted_bytes_are_added_to_those_of_the_same_versions(tmp_path):
    def contents(versions, **methods):
        counts = {method: {"saved_bytes": n, "host_bytes": 0} for method, n in methods.items()}
        return {"versions": versions, "cases": {"vit-s": {"title": "old", "methods": counts}}}

    def counted(results):
        return [(m, result["saved_bytes"]) for m, result in results["cases"]["vit-s"]["methods"].items()]

    path = tmp_path / "counted.json"
    assert counted(whole_step.merged(contents("1", plain=3), path)) == [("plain", 3)]
    path.write_text(json.dumps(contents("1", half=4, plain=3)))
    assert counted(whole_step.merged(contents("1", exact=2, half=5), path)) == [("plain", 3), ("exact", 2), ("half", 5)]
    assert counted(whole_step.merged(contents("2", exact=2), path)) == [("exact", 2)]


@pytest.mark.usefixtures("one_thread")
def test_counting_without_running_is_counting(tmp_path):
    """On tiny models: bytes of shapes alone, and of real steps."""
    pytest.importorskip("peft")
    methods = "plain,8bit,every-second"
    files = [tmp_path / "counted.json", tmp_path / "counted.md"]
    script = [sys.executable, ROOT / "benchmarks/whole_step.py", "--small", "--cases", "smollm2-lora"]
    outputs = ["--json", files[0], "--table", files[1]]
    subprocess.run([*script, "--bytes-only", "--methods", methods, *outputs], check=True, timeout=600)
    counted = json.loads(files[0].read_text())["cases"]["smollm2-lora"]["methods"]
    assert files[1].read_text() == whole_step.counted_markdown(json.loads(files[0].read_text()))
    case = whole_step.CASES["smollm2-lora"]
    for method, result in counted.items():
        training = whole_step.Training(case, method, case.make(True), case.batch(True))
        training.step()
        assert training.saved_bytes() == (result["saved_bytes"], 0), method


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("--methods plain,offload", "--methods has offload, whose time on a CPU says nothing: pass --bytes-only"),
        ("--bytes-only --small", "--small is given with --bytes-only, expected --json and --table too"),
    ],
)
def test_options_that_do_not_go_together(options, wanted, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["whole_step.py", *options.split()])
    with pytest.raises(SystemExit):
        whole_step.main()
    assert wanted in capsys.readouterr().err


# Stand-ins for fused kernels


def small_llama(dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 200}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).train().to(dtype)
    model.lm_head.requires_grad_(False)
    return model


def test_stand_ins_compute_what_the_layers_compute():
    import fused_stand_ins

    plain, fused = small_llama(), small_llama()
    fused_stand_ins.fuse_norms_and_products(fused)
    ids = torch.randint(0, 200, (3, 50))  # more rows than there are in two chunks of the loss
    loss = plain(input_ids=ids, labels=ids).loss
    ours = fused_stand_ins.FusedLoss(fused)(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(ours, loss)
    (2 * loss).backward()
    (2 * ours).backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in fused.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        # The same arithmetic in another order, in float32.
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-7)


def test_stand_ins_save_what_the_kernels_save():
    import fused_stand_ins

    rows, width, hidden, dtype = 3 * 50, 32, 96, torch.bfloat16
    gate, up = (torch.randn(rows, hidden, dtype=dtype, requires_grad=True) for _ in range(2))
    x = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight, table = torch.ones(width, dtype=dtype), torch.randn(200, width, dtype=dtype)

    def saved(function):
        # (Hooks would also see what the loss saves of each chunk, and drops at once.)
        return bytes_alive(function)[0]

    assert saved(lambda: fused_stand_ins._Product.apply(gate, up)) == 0  # both were there before
    assert saved(lambda: fused_stand_ins._Product.apply(gate + 1, up + 1)) == 2 * rows * hidden * 2
    assert saved(lambda: fused_stand_ins._Norm.apply(x + 1, weight, 1e-5)) == 2 * rows * width + 4 * rows
    labels = torch.zeros(rows, dtype=torch.long)
    assert saved(lambda: fused_stand_ins._Loss.apply(x + 1, table, labels)) == 2 * rows * width
