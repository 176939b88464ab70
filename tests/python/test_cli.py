"""What every command is to a terminal: interruptions, closed pipes, ASCII, and whose voices are heard."""

import logging
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from lomem.commands import model as model_commands
from lomem.commands import presets, terminal
from lomem.commands.cli import main
from torch import nn

#: Quick ones; CONFIG is the folder of a small model.
COMMANDS = {
    "info": ["info"],
    "demo": ["demo", "--epochs", "1", "--seeds", "2"],
    "memory": ["memory", "--model", "CONFIG", "--lora", "r=4", "--batch", "1"],
    "convert": ["convert", "--dry-run", "--model", "CONFIG"],
    "fit": ["fit", "gelu", "--bits", "1"],
    "bench": ["bench", "--only", "silu", "--elements", "4K", "--threads", "1", "--rounds", "2", "--dtypes", "fp32"],
}

#: Runs the command line after a change.
SCRIPT = "import sys, lomem.commands.cli\n{change}\nsys.exit(lomem.commands.cli.main(sys.argv[1:]))"


def words(name, config):
    return [config if word == "CONFIG" else word for word in COMMANDS[name]]


def environment(**changes):
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONWARNINGS", "PYTHONIOENCODING", "PYTHONUTF8")}
    return kept | {"OMP_NUM_THREADS": "1"} | changes


def run(arguments, change="", **options):
    command = [sys.executable, "-c", SCRIPT.format(change=change), *arguments]
    options.setdefault("env", environment())
    return subprocess.run(command, capture_output=True, timeout=600, check=False, **options)


# Ctrl-C


#: Says where it is, and waits. (What a shell starts in the background inherits that SIGINT is ignored.)
WAIT = """
import signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
def wait(*args, **kwargs):
    print("here", file=sys.__stderr__, flush=True)
    time.sleep(100)
"""
#: Where a command is interrupted, in the midst of its work.
BUSY = {
    "info": "lomem.commands.cli.platform.python_version = wait",
    "demo": "import lomem.commands.demo; lomem.commands.demo.Run.step = wait",
    "memory": "import lomem.memory; lomem.memory.estimate = wait",
    "convert": "import lomem.conversion; lomem.conversion.convert = wait",
    "fit": "import lomem.commands.fit; lomem.commands.fit.fit = wait",
    "bench": "import lomem.commands.bench; lomem.commands.bench.measure_and_print = wait",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_is_one_line(name, config):
    command = [sys.executable, "-c", SCRIPT.format(change=WAIT + BUSY[name]), *words(name, config)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stderr.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=200)
    assert error == f"lomem {name}: interrupted\n"
    assert process.returncode == 130


# Pipes


@pytest.mark.parametrize("name", [*COMMANDS, "help"])
def test_a_closed_pipe_ends_silently(name, config):
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ["memory", "--help"] if name == "help" else words(name, config)
    command = [sys.executable, "-c", SCRIPT.format(change=""), *arguments]
    try:
        result = subprocess.run(
            command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=600, check=False, env=environment()
        )
    finally:
        os.close(writer)
    if name == "bench":  # whose progress goes to the error stream, and which ends as rich does
        assert "Traceback" not in result.stderr
        assert result.returncode == 1
    else:
        assert result.stderr == ""
        assert result.returncode in ((0, 141) if name == "help" else (141,))  # argparse minds no closed pipe itself


def test_what_is_written_is_written_though_nobody_reads(config, tmp_path):
    file = tmp_path / "x.json"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lomem", *words("memory", config), "--method", "plain", "--json", str(file)]
    subprocess.run(command, stdout=writer, stderr=subprocess.DEVNULL, timeout=600, check=False, env=environment())
    os.close(writer)
    assert file.read_text(encoding="utf-8").startswith("{")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_full_disk_is_one_sentence():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [sys.executable, "-m", "lomem", "info"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("lomem info: [Errno 28] No space left on device")
    assert result.stderr.count("\n") == 1


# ASCII

ASCII = {
    "PYTHONIOENCODING": {"PYTHONIOENCODING": "ascii"},
    "the C locale": {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "PYTHONIOENCODING") for name in COMMANDS), ("demo", "the C locale")]
)
def test_ascii_terminals_print(name, kind, config):
    result = run(words(name, config), env=environment(COLUMNS="200", **ASCII[kind]))
    assert result.returncode == 0, result.stderr
    text = result.stdout.decode("ascii")
    assert len(text.splitlines()) > 3
    assert "?" not in text
    if name == "demo":
        assert "mean of 2 seeds +/- standard error" in " ".join(text.split())  # the title may have two lines
        rows = [line for line in text.splitlines() if line.startswith(("|", "+"))]
        assert len({len(row) for row in rows}) == 1  # and the columns stand under each other


def test_reports_print_on_ascii_terminals():
    program = (
        "import torch, lomem; model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU());"
        "x = torch.randn(2, 4); print(lomem.memory.profile(model, x)); print(lomem.memory.step_peak(model, x));"
        "print(lomem.convert(model, x))"
    )
    env = environment(PYTHONIOENCODING="ascii")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, env=env)
    assert result.returncode == 0, result.stderr
    assert "saved for backward" in result.stdout.decode("ascii")


@pytest.mark.parametrize(("text", "spelled"), [("1 ± 2", "1 +/- 2"), ("a…", "a..."), ("ö", "?"), ("plain", "plain")])
def test_what_ascii_lacks_is_spelled(text, spelled, tmp_path):
    with (tmp_path / "x").open("w+", encoding="ascii") as file:
        with terminal.readable(file):
            file.write(text)
        assert file.errors == "strict"
        file.seek(0)
        assert file.read() == spelled


# Voices

#: A model that warns, logs and prints wherever it can.
LOUD = """
import logging, os, types, warnings
def loud(where):
    warnings.warn("WARNED " + where)
    warnings.warn("WARNED " + where, DeprecationWarning)
    logging.getLogger("somebody").warning("LOGGED " + where)
    logging.getLogger("somebody").error("LOGGED " + where)
    print("PRINTED", where); print("PRINTED", where, file=sys.stderr)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("transformers", "peft", "bitsandbytes"):
            loud("at the import of " + name)
sys.meta_path.insert(0, Finder())
import torch
forward = torch.nn.Linear.forward
def linear(self, x):
    loud("in the model")
    return forward(self, x)
torch.nn.Linear.forward = linear
"""


@pytest.mark.parametrize("name", ["memory", "convert"])
def test_other_libraries_are_silent(name, config):
    result = run(words(name, config), LOUD)
    assert result.returncode == 0, result.stderr
    assert result.stderr == b""
    for word in (b"WARNED", b"LOGGED", b"PRINTED"):
        assert word not in result.stdout
    assert result.stdout


@pytest.mark.parametrize(
    "options", [["--lora", "r=4", "--method", "plain,lomem,checkpoint"], ["--4bit", "--lora", "r=4"]]
)
def test_nothing_but_the_table_of_memory(options, config):
    """With the real libraries, as they are."""
    result = run(["memory", "--model", config, *options])
    assert result.returncode == 0, result.stderr
    assert result.stderr == b""


def test_warnings_that_are_asked_for_are_heard(config):
    result = run(words("convert", config), LOUD, env=environment(PYTHONWARNINGS="default"))
    assert b"WARNED in the model" in result.stderr
    assert b"WARNED" not in result.stdout


def test_whoever_keeps_a_silent_stream_has_the_stream_afterwards(capsys):
    before = logging.root.manager.disable, sys.stdout, sys.stderr, list(warnings.filters)
    with terminal.quiet():
        handler = logging.StreamHandler(sys.stderr)
        kept = sys.stdout
        print("silent")
        kept.flush()
        logging.getLogger("x").error("silent")
    logger = logging.getLogger("x")
    logger.addHandler(handler)
    try:
        logger.error("heard")
    finally:
        logger.removeHandler(handler)
    kept.write("heard too")
    printed = capsys.readouterr()
    assert "heard" in printed.err
    assert printed.out == "heard too"
    assert "silent" not in printed.err
    assert before == (logging.root.manager.disable, sys.stdout, sys.stderr, list(warnings.filters))


# Errors


class _HiddenError(LookupError):
    pass


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (_HiddenError("no\nsuch thing"), "LookupError: no such thing"),
        (RuntimeError("lomem.memory.estimate: the model is odd"), "lomem.memory.estimate: the model is odd"),
        (TypeError(), "TypeError"),
        (AssertionError("x" * 50 + " y" * 400), "AssertionError: " + "x" * 50),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("command", [["memory"], ["convert", "--dry-run"]], ids=lambda c: c[0])
def test_no_internal_names_in_messages(error, told, command, config, monkeypatch, capsys):
    class Raises(nn.Module):
        def forward(self, **kwargs):
            raise error

    def build(*args):
        model = Raises()
        model.weight = nn.Parameter(torch.zeros(1))
        return model

    monkeypatch.setattr(presets, "build", build)
    monkeypatch.setattr(model_commands.conversion, "convert", lambda model, *args, **kwargs: model())
    assert main([*command, "--model", config]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"lomem {command[0]}: LlamaForCausalLM")
    assert f"does not run: {told}" in printed
    assert printed.count("\n") == 1
    assert len(printed) < 600
    for internal in ("_HiddenError", "conversion._", "memory._", "Traceback"):
        assert internal not in printed
