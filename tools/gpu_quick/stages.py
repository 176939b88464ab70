"""The stages, the most important first. Run as a program, this is one of them."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import events
from .driver import Stage, how
from .options import ROOT, Options, stage_command

LIBRARY = ("CMakeLists.txt", "cmake", "cpp", "pyproject.toml", "python")
C_TESTS = (*LIBRARY, "tests/cpp")
TESTS = (*LIBRARY, "tests/python", "tools/gpu_quick/stages.py")
SELF = (*LIBRARY, "tools/gpu_quick")

#: What torch.compile and torch.export do with an op: a stage of its own, since they take long.
COMPILER = "(compile or export)"
#: Tests of test_cuda.py that take long, or a large part of the memory: stages of their own.
EXHAUSTIVE, BIG = "every_float32", "beyond_2_to_31"


def stages(options: Options) -> list[Stage]:
    """All stages. Limits are for 16 cores and one H100 or H200."""

    def stage(name: str, title: str, limit: float, sources: tuple[str, ...], *needs: str, on_gpu: bool = True) -> Stage:
        outputs = (*options.gtests(), options.python / "lomem") if name == "build" and not options.installed else ()
        if not has_googletest(options):
            outputs = outputs[-1:]
        return Stage(name, title, stage_command(name), limit * options.patience, needs, sources, outputs, on_gpu)

    return [
        stage("build", "library and device tests", 240, C_TESTS, on_gpu=False),
        stage("launch", "the first kernels", 60, LIBRARY, "build"),
        stage("device-tests", "kernels from C++, without torch", 90, C_TESTS, "build"),
        stage("ops", "Python tests of the ops on the device", 150, TESTS, "build"),
        stage("bits", "forward passes equal torch's: every float32", 60, TESTS, "build"),
        stage("models", "a training step of converted models", 120, SELF, "build"),
        stage("big", "tensors of more than 2^31 elements", 60, TESTS, "build"),
        stage("bench", "speed, beside the bandwidth of copies", 60, SELF, "build"),
        stage("sanitizer", "compute-sanitizer on the device tests", 90, C_TESTS, "build"),
        stage("compile", "Python tests of torch.compile and torch.export", 120, TESTS, "build"),
    ]


def run(command: Sequence[str | Path], **variables: str) -> int:
    """Runs a command with its output in the log."""
    print("$", *command, flush=True)
    return subprocess.run([str(word) for word in command], env={**os.environ, **variables}, check=False).returncode


# Building.


def has_googletest(options: Options) -> bool:
    """Whether the C++ tests can be built without network."""
    headers = (Path(prefix) / "include/gtest/gtest.h" for prefix in ("/usr", "/usr/local", sys.prefix))
    return any("GOOGLETEST" in define for define in options.defines) or any(header.exists() for header in headers)


def build(options: Options) -> int:
    """Builds and installs the package as `make gpu-build` does, and the device tests in the same build."""
    if options.installed:
        events.note("Nothing was built: the tests ran with the lomem that Python imports.")
        return check_package()
    cache = options.build / "CMakeCache.txt"
    if cache.exists() and f"\nCMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text(encoding="utf-8"):
        events.note("The build folder was of another checkout, and was removed.")
        shutil.rmtree(options.build)
    targets = ["lomem", "_C", "_reused_memory"]
    defines = {"LOMEM_CUDA": "OFF" if options.rehearse else "ON", "LOMEM_BUILD_INSTALL_TESTS": "OFF"}
    if not options.rehearse:
        defines["CMAKE_CUDA_ARCHITECTURES"] = f"{options.architecture}-real"
        targets.append("lomem_cuda")
    if has_googletest(options):
        defines["LOMEM_BUILD_TESTS"] = "ON"
        targets += [path.name for path in options.gtests() if not options.device_tests]
        targets += ["lomem_cuda_on_host"] if options.rehearse else []
    else:
        events.note("GoogleTest was not found: the device tests were not built.")
    defines |= dict(define.split("=", 1) for define in options.defines)
    variables = {"CMAKE_BUILD_PARALLEL_LEVEL": str(options.jobs)}
    if shutil.which("ccache"):
        variables = {f"CMAKE_{language}_COMPILER_LAUNCHER": "ccache" for language in ("CXX", "CUDA")} | variables
    else:
        events.note("There was no ccache.")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-v", "--no-build-isolation"]
    command += ["--no-deps", "--upgrade", "--target", str(options.python), "-C", f"build-dir={options.build}"]
    command += [word for name, value in defines.items() for word in ("-C", f"cmake.define.{name}={value}")]
    code = run([*command, "-C", f"build.targets={';'.join(targets)}", "."], **variables)
    return code or check_package()


def check_package() -> int:
    """Imports the package."""
    script = "import lomem, torch; print(lomem.__file__, torch.__version__, lomem._C.cuda_archs())"
    return run([sys.executable, "-c", script])


LAUNCH = """
import torch, lomem
x = torch.randn(100_003, device={device!r}, requires_grad=True)
for function in lomem.functional.gelu, lomem.functional.silu:
    y = function(x)
    assert torch.equal(y, getattr(torch.nn.functional, function.__name__)(x)), function
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.isfinite().all(), function
print("on", x.device, ":", gradient[:3].tolist())
"""


def launch(options: Options) -> int:
    """The first kernels. Nothing needs this stage: if they fail, others may still run."""
    return run([sys.executable, "-c", LAUNCH.format(device=options.device)])


# Tests in C++.


def device_tests(options: Options) -> int:
    """Runs the executables of GoogleTest, each in several processes."""
    executables = [path for path in options.gtests() if path.exists()]
    if not executables:
        return skip("there are no device tests: they were not built, and --device-tests names none")
    count = min(options.jobs, 8)

    def run_shard(shard: tuple[Path, int]) -> int:
        return gtest([str(shard[0])], GTEST_TOTAL_SHARDS=str(count), GTEST_SHARD_INDEX=str(shard[1]))[0]

    with ThreadPoolExecutor(count * len(executables)) as pool:
        return max(pool.map(run_shard, itertools.product(executables, range(count))))


def gtest(command: Sequence[str], prefix: str = "", **variables: str) -> tuple[int, list[str]]:
    """Runs an executable of GoogleTest, and says what each test does as soon as it is known.

    Returns the exit status, and what compute-sanitizer says at the end.
    """
    libraries = [str(Options.of_environment().python / "lomem/lib"), *torch_libraries()]
    path = os.pathsep.join([*libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        # For a build that has moved.
        env={**os.environ, **variables, "LD_LIBRARY_PATH": path},
    )
    assert process.stdout is not None
    running, said = "", [""]
    for line in process.stdout:
        print(line, end="", flush=True)
        match = re.match(r"\[ +(RUN|OK|FAILED|SKIPPED) +\] (\w+[./]\S+?)(?:,.*| \(\d+ ms\))?$", line)
        if match is None:
            said.append(line)
        elif match[1] == "RUN":
            running, said = prefix + match[2], []
            events.begin(running)
        elif line.rstrip().endswith("ms)"):  # else it is in the list at the end
            result = {"OK": "passed", "FAILED": "failed", "SKIPPED": "skipped"}[match[1]]
            events.outcome(prefix + match[2], result, "".join(said))
            running = ""
    code = process.wait()
    if running:
        events.outcome(running, "failed", how(code) + "\n" + "".join(said))
    return abs(code), [line for line in said if line.startswith("=====")]


def torch_libraries() -> list[str]:
    """The folder of torch's libraries."""
    spec = importlib.util.find_spec("torch")
    return [] if spec is None or spec.origin is None else [str(Path(spec.origin).parent / "lib")]


#: What races could be in: kernels that share memory between threads (as in `make gpu-sanitize`).
RACES = ("Norms", "StepBackward")


def sanitizer(options: Options) -> int:
    """compute-sanitizer on the device tests, each in a process of its own: they run many times slower."""
    executable = options.gtests()[0]
    if not executable.exists():
        return skip("there are no device tests: they were not built, and --device-tests names none")
    program = shutil.which("compute-sanitizer")
    if program is None and not options.rehearse:
        return skip("compute-sanitizer is not installed")
    tests = sample(executable)
    runs = [("memcheck", test) for test in tests]
    runs += [("racecheck", test) for test in tests if any(word in test for word in RACES)]

    def under(tool: str, test: str) -> int:
        command = [str(executable), f"--gtest_filter={test}"]
        if program is not None and not options.rehearse:
            command = [program, "--tool", tool, "--error-exitcode", "9", *command]
        code, found = gtest(command, f"{tool}: ")
        if code:
            events.check(f"{tool} of {test}", False, how(code) + "\n" + "".join(found))
        return code

    with ThreadPoolExecutor(options.jobs) as pool:
        return max(pool.map(lambda run: under(*run), runs))


def sample(executable: Path) -> list[str]:
    """Every test once, whatever the number of types or parameters that it is instantiated with."""
    listed = subprocess.run([executable, "--gtest_list_tests"], capture_output=True, text=True, check=True).stdout
    tests: dict[str, str] = {}
    suite = ""
    for line in listed.splitlines():
        if not line.startswith(" "):
            suite = line.split("#")[0].strip()
        else:
            test = suite + line.split("#")[0].strip()
            tests.setdefault(re.sub(r"/.*", "", suite) + re.sub(r"/.*", "", test.removeprefix(suite)), test)
    return list(tests.values())


def skip(reason: str) -> int:
    """Ends a stage that cannot run here."""
    events.skip(reason)
    return 0


# Tests in Python.


def parametrised_files() -> list[str]:
    """The files with tests that run on every device: those that take the fixture `device`."""
    paths = sorted((ROOT / "tests/python").glob("test_*.py"))
    pattern = re.compile(r"^ *def test_\w+\([^)]*\bdevice\b", re.MULTILINE)
    return [str(path.relative_to(ROOT)) for path in paths if pattern.search(path.read_text(encoding="utf-8"))]


def pytest(options: Options, files: list[str], keyword: str, jobs: int, **variables: str) -> int:
    """Runs tests in several processes: by pytest-xdist, or by splitting the files among them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_quick.pytest_events", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "--tb=short", "-m", "not slow", "-k", keyword]
    # Results are compared with those of the CPU, whose threads are shared out.
    variables["OMP_NUM_THREADS"] = str(max(1, options.jobs // jobs))
    if jobs == 1:
        return run([*command, *files], **variables)
    if importlib.util.find_spec("xdist") is not None:
        return run([*command, "-n", str(jobs), *files], **variables)
    events.note("There was no pytest-xdist: files were split among processes.")
    print("$", *command, flush=True)
    # The largest first, one to each process in turn.
    ordered = sorted(files, key=lambda file: -(ROOT / file).stat().st_size)
    parts = [part for i in range(jobs) if (part := ordered[i::jobs])]
    processes = [subprocess.Popen([*command, *part], env={**os.environ, **variables}) for part in parts]
    codes = [process.wait() for process in processes]
    nothing = 5  # of these files, nothing is selected
    return max([code for code in codes if code != nothing], default=nothing, key=abs)


#: Tests that the stand-in for test_cuda.py cannot run: of streams, graphs, autocast and the allocator of a GPU.
ONLY_ON_GPU = (
    "stream or waits or graphs or autocast or mixed or stop_the_device or memory_of_a_step or library_is_loaded"
)


def on_every_device(options: Options, keyword: str, jobs: int) -> int:
    """The tests that are parametrised over devices, on the GPU; in a rehearsal, a sample of them.

    In a rehearsal, the bodies of the CUDA kernels run in place of the CPU kernels, if there is the library for it.
    """
    if not options.rehearse:
        return pytest(options, [*parametrised_files(), "tests/python/test_cuda.py"], f"cuda and {keyword}", jobs)
    if not options.host_library():
        events.note("There was no library of CUDA kernels for the CPU: CPU kernels ran in their place.")
    variables = {"LOMEM_CUDA_ON_HOST": options.host_library(), "LOMEM_GPU_QUICK_SAMPLE": "40"}
    return pytest(options, parametrised_files(), f"cpu and {keyword}", jobs, **variables)


def of_the_gpu(options: Options, keyword: str, jobs: int) -> int:
    """Tests of test_cuda.py; in a rehearsal, on tensors of the CPU."""
    if not options.rehearse:
        return pytest(options, ["tests/python/test_cuda.py"], keyword, jobs)
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests/python"), os.environ["PYTHONPATH"]])}
    variables |= {"PYTEST_PLUGINS": "cuda_stand_in"}
    return pytest(options, ["tests/python/test_cuda.py"], f"{keyword} and not ({ONLY_ON_GPU})", jobs, **variables)


def ops(options: Options) -> int:
    """All but what has a stage of its own."""
    keyword = f"not {COMPILER} and not {EXHAUSTIVE} and not {BIG}"
    code = on_every_device(options, keyword, min(options.jobs, 12))
    return max(code, of_the_gpu(options, keyword, 1)) if options.rehearse else code


def compiled(options: Options) -> int:
    """What takes long: compilations."""
    return on_every_device(options, COMPILER, min(options.jobs, 12))


def bits(options: Options) -> int:
    """Every bit pattern of float32; those of 16 bits are among the tests of the ops."""
    return of_the_gpu(options, EXHAUSTIVE, min(options.jobs, 2))


def big(options: Options) -> int:
    """One after the other, for the memory's sake."""
    return of_the_gpu(options, BIG, 1)


# Figures.


def bench(options: Options) -> int:
    """The essential rows of `lomem bench`."""
    if importlib.util.find_spec("rich") is None:
        return skip("lomem bench needs rich, which is not installed")
    results = Path(os.environ.get(events.EVENTS, "bench")).with_suffix(".bench.json")
    sizes = ["--elements", "64M", "--shapes", "16384x4096", "--dtypes", "bf16,fp32", "--rounds", "9"]
    if options.rehearse:
        sizes = ["--elements", "4K", "--shapes", "64x64", "--dtypes", "bf16", "--rounds", "1", "--seconds", "1e-4"]
        sizes += ["--threads", "1"]
    only = "gelu,silu,layer-norm-affine,rms-norm-affine"
    command = [sys.executable, "-m", "lomem", "bench", "--device", options.device, "--only", only, *sizes]
    code = run([*command, "--json", results])
    # Tables are saved as they are measured.
    records = json.loads(results.read_text(encoding="utf-8"))["records"] if results.exists() else []
    for record in records:
        if record["contender"] == "lomem":
            events.figure(
                "Speed (lomem bench)",
                case=record["case"],
                dtype=record["dtype"],
                **{"pass": record["pass"]},
                us=round(record["microseconds"], 1),
                **{"GB/s": round(record["gigabytes_per_second"])},
                **{"copy GB/s": round(record["copy_gigabytes_per_second"])},
                **{"of copy": round(record["fraction_of_copy"], 2)},
                **{"torch's time / lomem's": round(record["torch_time_over_time"], 2)},
            )
    return code


def train(options: Options) -> int:
    """See models.py."""
    if importlib.util.find_spec("transformers") is None:
        return skip("the models need transformers, which is not installed")
    from . import models

    models.compare_all(options)
    return 0


FUNCTIONS: dict[str, Callable[[Options], int]] = {
    "build": build,
    "launch": launch,
    "device-tests": device_tests,
    "ops": ops,
    "bits": bits,
    "models": train,
    "big": big,
    "bench": bench,
    "sanitizer": sanitizer,
    "compile": compiled,
}


if __name__ == "__main__":
    sys.exit(FUNCTIONS[sys.argv[1]](Options.of_environment()))
