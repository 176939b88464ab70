"""The program behind `make gpu-quick`, with stages of its own: what happens to them, and what is kept of it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from gpu_quick import driver, events, models, pytest_events, stages, summary  # noqa: E402
from gpu_quick.driver import FAILED, INTERRUPTED, PASSED, SKIPPED, TIMEOUT, Driver, Stage  # noqa: E402
from gpu_quick.options import Options  # noqa: E402

SAY = "from gpu_quick import events; "
#: Longer than any test: what sleeps so long is killed.
HANG = "open('hangs', 'w').close(); import time; time.sleep(1000)"


def stage(name, code="", limit=60, **fields):
    return Stage(name, f"title of {name}", (sys.executable, "-c", code), limit, **fields)


def make_driver(folder, *fakes, **fields):
    defaults = {"identity": {"torch": "2.11"}, "gpu": "H200", "budget": 600, "environment": environment()}
    (folder / "source").mkdir(exist_ok=True)
    return Driver(fakes, folder / "results", folder, **{**defaults, **fields})


def environment():
    return {"PYTHONPATH": str(ROOT / "tools")}


def record(folder, name):
    return json.loads((folder / "results" / f"{name}.json").read_text(encoding="utf-8"))


def counted(name, **fields):
    """A stage that says how often it ran."""
    return stage(name, f"open('{name}.runs', 'a').write('x')", **fields)


def runs(folder, name):
    path = folder / f"{name}.runs"
    return len(path.read_text(encoding="utf-8")) if path.exists() else 0


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within a minute")


@pytest.fixture
def patient(tmp_path, monkeypatch):
    """A limit of more than 100 s is over as soon as a stage hangs, not before; then the clock is put forward."""
    clock, ahead = time.monotonic, [0.0]

    class Patient(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is not None and timeout > 100:
                wait_for((tmp_path / "hangs").exists)
                ahead[0] += timeout
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Patient)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + ahead[0])


# One stage.


def test_what_a_stage_says_is_kept(tmp_path):
    code = SAY + (
        "events.check('a', True, 'fine'); events.begin('b'); events.outcome('b', 'skipped'); events.note('a note'); "
        "events.figure('Speed', us=3); print('hello')"
    )
    assert make_driver(tmp_path, stage("one", code)).run()
    got = record(tmp_path, "one")
    assert (got["status"], got["tests"]) == (PASSED, {"passed": 1, "failed": 0, "skipped": 1})
    assert (got["failures"], got["unfinished"], got["notes"]) == ([], [], ["a note"])
    assert got["figures"] == [{"table": "Speed", "us": 3}]
    assert got["log"][-1] == "hello"
    assert got["identity"]["gpu"] == "H200"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("import os; os.abort()", "killed by SIGABRT"),
        (SAY + "events.check('a', False, 'is 1, expected 2')", "see the failures"),
    ],
)
def test_a_stage_that_fails_does_not_stop_the_others(tmp_path, code, reason):
    fakes = stage("one", code), stage("two", needs=("one",)), stage("three")
    assert not make_driver(tmp_path, *fakes).run()
    one, two, three = (record(tmp_path, fake.name) for fake in fakes)
    assert (one["status"], one["reason"]) == (FAILED, reason)
    assert (two["status"], two["reason"]) == (SKIPPED, "needs one")
    assert three["status"] == PASSED


def test_a_program_that_is_not_there(tmp_path):
    fake = Stage("one", "", ("no-such-program",), 60)
    assert not make_driver(tmp_path, fake, stage("two")).run()
    assert record(tmp_path, "one")["status"] == FAILED
    assert "no-such-program" in record(tmp_path, "one")["reason"]
    assert record(tmp_path, "two")["status"] == PASSED


def test_a_stage_that_hangs(tmp_path, patient):
    code = SAY + "events.check('a', True, ''); events.begin('b'); events.note('so far'); " + HANG
    assert not make_driver(tmp_path, stage("one", code, limit=200), stage("two")).run()
    got = record(tmp_path, "one")
    assert got["status"] == TIMEOUT
    assert (got["tests"]["passed"], got["unfinished"], got["notes"]) == (1, ["b"], ["so far"])
    assert any("Fatal Python error: Aborted" in line for line in got["log"]), "it says where it hung"
    assert record(tmp_path, "two")["status"] == PASSED


def test_output_that_is_no_text(tmp_path):
    cut_off = b'\xff\n{"kind": "no'
    code = (
        f"import os; os.write(1, b'\\xff\\xfe\\x00 ended'); open(os.environ['{driver.EVENTS}'], 'wb').write({cut_off})"
    )
    assert make_driver(tmp_path, stage("one", code)).run()
    assert record(tmp_path, "one")["log"][-1].endswith(" ended")


@pytest.mark.parametrize("ending", ["", HANG])
def test_children_that_are_left_behind(tmp_path, ending, request):
    if ending:
        request.getfixturevalue("patient")
    code = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)']); "
        "open('child', 'w').write(str(child.pid))"
    )
    make_driver(tmp_path, stage("one", f"{code}; {ending}", limit=200 if ending else 60)).run()
    assert record(tmp_path, "one")["status"] == (TIMEOUT if ending else PASSED)
    pid = int((tmp_path / "child").read_text(encoding="utf-8"))
    wait_for(lambda: not is_running(pid))


def test_a_stage_may_find_that_it_cannot_run(tmp_path):
    code = SAY + "events.skip('there is no such tool')"
    assert make_driver(tmp_path, stage("one", code), stage("two", needs=("one",))).run()
    assert (record(tmp_path, "one")["status"], record(tmp_path, "one")["reason"]) == (SKIPPED, "there is no such tool")
    assert record(tmp_path, "two")["reason"] == "needs one"


# The driver is stopped, and runs again.

PROGRAM = """
import signal, sys
from pathlib import Path
from gpu_quick import __main__ as program, driver
folder = Path(sys.argv[1])
code = "from gpu_quick import events; events.check('a', True, ''); import os, time; "
code += "open('pid', 'w').write(str(os.getpid())); time.sleep(1000)"
stages = [driver.Stage(n, n, (sys.executable, "-c", c), 900) for n, c in {"one": "", "two": code, "three": ""}.items()]
signal.signal(signal.SIGTERM, program.stop)
driver.Driver(stages, folder / "results", folder, {"torch": "2.11"}, "H200", 900).run()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_driver_that_is_killed_and_runs_again(tmp_path, number):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], env={**os.environ, **environment()})
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(encoding="utf-8"))
    wait_for((tmp_path / "results/two.json").exists)
    pid = int((tmp_path / "pid").read_text(encoding="utf-8"))
    process.send_signal(number)
    process.wait()
    assert record(tmp_path, "one")["status"] == PASSED
    assert not (tmp_path / "results/three.json").exists()
    again = make_driver(tmp_path, counted("one"), stage("two"), stage("three"))
    wait_for(lambda: not is_running(pid))
    assert record(tmp_path, "two")["status"] == INTERRUPTED
    assert record(tmp_path, "two")["tests"]["passed"] == 1, "what it had said is kept"
    assert again.run()
    assert runs(tmp_path, "one") == 0, "what passed is not repeated"
    assert [record(tmp_path, name)["status"] for name in ("two", "three")] == [PASSED, PASSED]


def test_another_process_of_that_number_is_left_alone(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HANG], start_new_session=True)
    try:
        pid, started = driver.identity_of(process.pid)
        driver.end_of([pid, started + 1])
        assert process.poll() is None
        driver.end_of([pid, started])
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()


def test_a_record_that_was_cut_off(tmp_path):
    fake = counted("one")
    make_driver(tmp_path, fake).run()
    (tmp_path / "results/one.json").write_text('{"status": "pas', encoding="utf-8")
    assert make_driver(tmp_path, fake).run()
    assert runs(tmp_path, "one") == 2


# What an earlier pass depends on.


def test_an_earlier_pass_counts(tmp_path):
    fakes = counted("one", sources=("source",), outputs=(tmp_path / "made",)), counted("two", on_gpu=False)
    (tmp_path / "made").touch()
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a.cpp").write_text("1", encoding="utf-8")

    def ran(**fields):
        before = runs(tmp_path, "one"), runs(tmp_path, "two")
        assert make_driver(tmp_path, *fakes, **fields).run()
        return runs(tmp_path, "one") - before[0], runs(tmp_path, "two") - before[1]

    assert ran() == (1, 1)
    assert ran() == (0, 0)
    (tmp_path / "source/a.cpp").write_text("2", encoding="utf-8")
    assert ran() == (1, 0), "a source has changed"
    (tmp_path / "source/b.cpp").touch()
    assert ran() == (1, 0), "a source is new"
    (tmp_path / "source/b.cpp").rename(tmp_path / "source/c.cpp")
    assert ran() == (1, 0), "a source has another name"
    (tmp_path / "source/__pycache__").mkdir()
    (tmp_path / "source/__pycache__/a.pyc").touch()
    assert ran() == (0, 0)
    assert ran(gpu="H100") == (1, 0)
    assert ran(gpu="H100", identity={"torch": "2.12"}) == (1, 1)
    (tmp_path / "made").unlink()
    assert ran(gpu="H100", identity={"torch": "2.12"}) == (1, 0), "what it made is gone"


def test_a_failure_is_tried_again(tmp_path):
    fake = stage("one", "import pathlib, sys; sys.exit(not pathlib.Path('ready').exists())")
    assert not make_driver(tmp_path, fake).run()
    (tmp_path / "ready").touch()
    assert make_driver(tmp_path, fake).run()


def test_choosing_stages(tmp_path):
    fakes = counted("one"), counted("two", needs=("one",)), counted("three")

    def ran(*arguments):
        before = [runs(tmp_path, fake.name) for fake in fakes]
        assert make_driver(tmp_path, *fakes).run(*arguments)
        return [runs(tmp_path, fake.name) - count for fake, count in zip(fakes, before, strict=True)]

    assert ran(["two"]) == [1, 1, 0], "what it needs runs too"
    assert ran(["two"]) == [0, 0, 0]
    assert ran(["two"], True) == [0, 1, 0]
    assert ran() == [0, 0, 1]
    assert ran([], True) == [1, 1, 1]
    with pytest.raises(ValueError, match="there is no stage four, expected some of one, two, three"):
        make_driver(tmp_path, *fakes).run(["four"])


def test_the_budget(tmp_path, patient):
    fakes = stage("one", HANG, limit=1000), counted("two")
    assert not make_driver(tmp_path, *fakes, budget=150).run()
    assert (record(tmp_path, "one")["status"], record(tmp_path, "one")["reason"]) == (TIMEOUT, "killed after 150 s")
    assert (record(tmp_path, "two")["status"], runs(tmp_path, "two")) == (SKIPPED, 0)
    assert record(tmp_path, "two")["reason"] == "the budget of 150 s is used up"
    make_driver(tmp_path, *fakes, budget=0).run()
    assert record(tmp_path, "one")["status"] == TIMEOUT, "what is known stays"


def test_what_changed_is_told_after_every_stage(tmp_path):
    seen = []
    run = make_driver(tmp_path, stage("one"), stage("two", "import sys; sys.exit(1)"))
    run.changed = lambda: seen.append([r["status"] for r in run.records()])
    run.run()
    assert seen == [[PASSED, "not run"], [PASSED, FAILED]]


# The page.


def test_the_page(tmp_path):
    fail = SAY + (
        "[events.check(f'test_{i}', False, 'line one\\nline two\\nline three\\nline four') for i in range(30)]; "
        "events.figure('Speed | memory', case='a|b', us=3); events.figure('Speed | memory', case='c', us=4); "
        "events.note('no ccache')"
    )
    fakes = stage("one"), stage("two", fail), stage("three", "print('```'); raise SystemExit(2)"), stage("four")
    run = make_driver(tmp_path, *fakes)
    run.run(["one", "two", "three"])
    machine = {"title": "gpu-quick", "device": "NVIDIA H200", "date": "2026-01-31", "GPU memory": "143771 MiB", "x": ""}
    (page,) = summary.write([tmp_path / "pages"], machine, run.records())
    assert page.name == "gpu-nvidia-h200-2026-01-31.md"
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# gpu-quick\n\n**Went wrong: two, three.**\n")
    assert "| GPU memory | 143771 MiB |\n" in text
    assert "| x |" not in text
    assert re.search(r"^\| one \| title of one \| passed \| 0 \|", text, re.MULTILINE)
    assert re.search(
        r"^\| two \| title of two \| \*\*failed\*\* \| \d+ \|  \| 30 \|  \| see the failures \|", text, re.MULTILINE
    )
    assert re.search(r"^\| four \| title of four \| not run \|", text, re.MULTILINE)
    assert "- `test_0`\n  > line one\n  > line two\n  > line three\n- `test_1`" in text
    assert "- and 5 more" in text
    assert "\n'''\n" in text, "the end of the log, of a stage that says no more"
    assert "- two: no ccache" in text
    assert "## Speed | memory\n\n| case | us |\n| --- | --- |\n| a\\|b | 3 |\n| c | 4 |\n" in text
    contents = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert contents["machine"] == machine
    assert [s["status"] for s in contents["stages"]] == [PASSED, FAILED, FAILED, "not run"]
    assert len(contents["stages"][1]["failures"]) == 30
    assert "log" not in contents["stages"][0]


def test_verdicts():
    machine = {"title": "gpu-quick"}
    for statuses, verdict in {
        (PASSED, SKIPPED): "Nothing went wrong.",
        (PASSED, "not run"): "Not finished.",
        (PASSED, INTERRUPTED): "**Went wrong: s1.**",
    }.items():
        records = [{"stage": f"s{i}", "title": "", "status": status} for i, status in enumerate(statuses)]
        assert f"\n{verdict}\n" in summary.markdown(machine, records)


# The stages themselves, as far as they run here. A rehearsal runs them all.


@pytest.fixture
def said(tmp_path, monkeypatch):
    """What stages say in this process."""
    path = tmp_path / "said"
    monkeypatch.setenv(driver.EVENTS, str(path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tools"))
    return lambda kind: [event for event in driver.read_events(path) if event["kind"] == kind]


def test_the_list_of_stages():
    for options in (Options(), Options(rehearse=True)):
        listed = stages.stages(options)
        names = [one.name for one in listed]
        assert names == list(stages.FUNCTIONS)
        for i, one in enumerate(listed):
            assert set(one.needs) <= set(names[:i])
            assert all((ROOT / source).exists() for source in one.sources)
    assert "tests/python/test_norms.py" in stages.parametrised_files()
    assert "tests/python/test_fit.py" not in stages.parametrised_files()


def test_words_that_choose_tests():
    source = (ROOT / "tests/python/test_cuda.py").read_text(encoding="utf-8")
    tests = re.findall(r"^def (test_\w+)\(", source, re.MULTILINE)
    for word in (stages.EXHAUSTIVE, stages.BIG, *stages.ONLY_ON_GPU.split(" or ")):
        assert any(word in test for test in tests), word


def test_the_command_of_the_build(tmp_path, monkeypatch, said):
    commands = []
    monkeypatch.setattr(stages, "run", lambda command, **variables: commands.append([*command, variables]) or 0)
    monkeypatch.setattr(stages.shutil, "which", lambda program: None)
    folder = tmp_path / "build"
    folder.mkdir()
    monkeypatch.setattr(Options, "build", folder)
    (folder / "CMakeCache.txt").write_text("\nCMAKE_HOME_DIRECTORY:INTERNAL=/elsewhere\n", encoding="utf-8")
    define = "FETCHCONTENT_SOURCE_DIR_GOOGLETEST=/a=b"
    assert stages.build(Options(jobs=7, defines=[define])) == 0
    command = commands[0]
    expected = {f"build-dir={folder}", "cmake.define.CMAKE_CUDA_ARCHITECTURES=90-real", f"cmake.define.{define}"}
    assert expected <= set(command[:-1])
    assert "lomem_cuda;lomem_cuda_device_tests" in next(
        word for word in command[:-1] if word.startswith("build.targets")
    )
    assert command[-1] == {"CMAKE_BUILD_PARALLEL_LEVEL": "7"}
    assert not folder.exists(), "the folder of another checkout is removed"
    assert [note["text"] for note in said("note")] == [
        "The build folder was of another checkout, and was removed.",
        "There was no ccache.",
    ]


GOOGLETEST = """\
import os, sys
print("[==========] Running 3 tests from 1 test suite.")
print("[ RUN      ] Suite/0.Good")
print("[       OK ] Suite/0.Good (0 ms)")
print("[ RUN      ] Suite/0.Bad")
print("a.cpp:3: Failure\\n  expected 1\\xff")
print("[  FAILED  ] Suite/0.Bad, where TypeParam = float (2 ms)")
print("[ RUN      ] Suite/0.Crash")
print("[  FAILED  ] 1 test, listed below:")
print("[  FAILED  ] Suite/0.Bad, where TypeParam = float")
sys.stdout.flush()
os.abort()
"""


def test_device_tests_are_read_as_they_run(tmp_path, said):
    executable = tmp_path / "tests.py"
    executable.write_text(f"#!{sys.executable}\n{GOOGLETEST}", encoding="utf-8")
    executable.chmod(0o755)
    assert stages.device_tests(Options(device_tests=str(executable))) == signal.SIGABRT
    assert [event["name"] for event in said("begin")] == ["Suite/0.Good", "Suite/0.Bad", "Suite/0.Crash"]
    good, bad, crash = said("test")
    assert (good["name"], good["outcome"]) == ("Suite/0.Good", "passed")
    assert (bad["name"], bad["outcome"]) == ("Suite/0.Bad", "failed")
    assert bad["message"].startswith("a.cpp:3: Failure\n  expected 1")
    assert (crash["name"], crash["outcome"]) == ("Suite/0.Crash", "failed")
    assert crash["message"].startswith("killed by SIGABRT\n")


SANITIZED = """\
import sys
from pathlib import Path
if "--gtest_list_tests" in sys.argv:
    print("Suite.\\n  Packing\\n  NormsOfAll\\nTyped/0.  # TypeParam = int\\n  Copy\\nTyped/1.\\n  Copy")
    sys.exit()
name = sys.argv[-1].partition("=")[2]
print(f"[ RUN      ] {name}\\n[       OK ] {name} (1 ms)")
bad = "racecheck" in sys.argv
print("========= Error: a race" if bad else "========= ERROR SUMMARY: 0 errors")
sys.exit(9 * bad)
"""


def test_the_sanitizer(tmp_path, said, monkeypatch):
    for name in ("tests", "compute-sanitizer"):
        (tmp_path / name).write_text(f"#!{sys.executable}\n{SANITIZED}", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    options = Options(device_tests=str(tmp_path / "tests"))
    monkeypatch.setenv("PATH", "")
    assert stages.sanitizer(options) == 0
    assert [event["reason"] for event in said("skip")] == ["compute-sanitizer is not installed"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert stages.sanitizer(options) == 9
    outcomes = [(event["name"], event["outcome"]) for event in said("test")]
    assert outcomes == [
        ("memcheck: Suite.Packing", "passed"),
        ("memcheck: Suite.NormsOfAll", "passed"),
        ("memcheck: Typed/0.Copy", "passed"),
        ("racecheck: Suite.NormsOfAll", "passed"),
        ("racecheck of Suite.NormsOfAll", "failed"),
    ]
    assert said("test")[-1]["message"] == "exit status 9\n========= Error: a race"


def test_without_device_tests(said):
    assert stages.device_tests(Options(device_tests="no-such-file")) == 0
    assert len(said("skip")) == 1


TESTS = {
    "test_one.py": "def test_good(): pass\ndef test_bad(): assert 1 == 2, 'of numbers'\n",
    "test_two.py": "import pytest\n@pytest.mark.skip\ndef test_skipped(): pass\ndef test_good(): pass\n",
    "test_three.py": "import no_such_module\n",
    "test_four.py": "def test_of_something_else(): pass\n",
}


@pytest.mark.parametrize("xdist", [True, False])
def test_python_tests(tmp_path, monkeypatch, said, xdist):
    if not xdist:
        monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: None)
    for name, text in TESTS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    files = [str(tmp_path / name) for name in TESTS]
    assert stages.pytest(Options(), files, "not something_else", 2) != 0
    outcomes = sorted((event["name"].rpartition("/")[2], event["outcome"]) for event in said("test"))
    assert outcomes == [
        ("test_one.py::test_bad", "failed"),
        ("test_one.py::test_good", "passed"),
        ("test_three.py", "failed"),
        ("test_two.py::test_good", "passed"),
        ("test_two.py::test_skipped", "skipped"),
    ]
    messages = [event["message"] for event in said("test") if event["outcome"] == "failed"]
    assert any(
        message.startswith(str(tmp_path / "test_one.py:2\n")) and "of numbers" in message for message in messages
    )
    assert any("no_such_module" in message for message in messages)
    assert bool(said("note")) != xdist
    assert stages.pytest(Options(), files[:2], "no_such_test", 2) == 5, "no test at all is no success"


def test_packages_that_are_missing(monkeypatch, said):
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: None)
    assert stages.bench(Options()) == stages.train(Options()) == 0
    assert [event["reason"].split()[-4:-1] for event in said("skip")] == [["which", "is", "not"]] * 2


def test_a_sample_of_tests(tmp_path, said, monkeypatch):
    (tmp_path / "test_many.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(10))\ndef test(i): pass\n", encoding="utf-8"
    )
    monkeypatch.setenv(pytest_events.SAMPLE, "4")
    assert stages.pytest(Options(), [str(tmp_path / "test_many.py")], "test", 1) == 0
    assert [event["name"][-3:] for event in said("test")] == ["[0]", "[4]", "[8]"]


@pytest.mark.parametrize(
    ("conversion", "autocast", "loss", "gradient", "good"),
    [
        ("activations", None, 2.0, 1.5, [True, True]),
        ("activations", None, 2.0000002, 1.5, [False, True]),
        ("activations", torch.bfloat16, 2.0, 2.5, [True, False]),
        ("norms", None, 2.0000002, 1.0001, [True, True]),
        ("norms", None, 2.0001, 1.01, [False, False]),
        ("norms", torch.bfloat16, 2.01, 1.01, [True, True]),
        ("both", torch.bfloat16, 2.1, 1.5, [False, True]),
    ],
)
def test_limits_of_a_training_step(said, conversion, autocast, loss, gradient, good):
    case = models.Case("vit-b", autocast, conversion, rehearse=True)
    before, after = ((torch.tensor(a), torch.tensor([b, 1.0])) for a, b in ((2.0, 1.0), (loss, gradient)))
    models.judge(case, before, after)
    assert [event["outcome"] == "passed" for event in said("test")] == good
    assert len(said("figure")) == 1


@pytest.mark.parametrize(
    ("rehearse", "estimate", "good"),
    [(True, 1000, True), (True, 999, False), (False, 930, True), (False, 910, False), (False, 1010, False)],
)
def test_limits_of_an_estimate(said, rehearse, estimate, good):
    models.compare_memory(models.Case("llama", None, "both", rehearse), estimate, 1000)
    assert [event["outcome"] == "passed" for event in said("test")] == [good]


def test_a_model_that_raises_does_not_hide_the_others(said):
    def fails():
        raise RuntimeError("out of memory")

    models.attempt(models.Case("llama", None, "both", True), fails)
    (event,) = said("test")
    assert (event["name"], event["outcome"]) == ("llama, fp32, both: RuntimeError", "failed")


def test_messages_are_short(said):
    events.outcome("a", "failed", "\n".join("x" * 1000 for _ in range(100)))
    (event,) = said("test")
    assert len(event["message"].splitlines()) == events.LINES
    assert len(event["message"]) < 5000


def test_the_command_line(tmp_path):
    command = [sys.executable, "-m", "gpu_quick", "--rehearse", "--list", "--results", str(tmp_path)]
    result = subprocess.run(command, env={**os.environ, **environment()}, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(stages.FUNCTIONS)
    assert all("not run" in line for line in result.stdout.splitlines())
