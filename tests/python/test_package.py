"""The package as it is installed: metadata, command, CMake package in the wheel, refusals."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import lomem
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MINOR = ".".join(torch.__version__.split(".")[:2])


def run(*command, **kwargs):
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=600, check=False, **kwargs
    )


def test_version_is_written_once():
    header = (ROOT / "cpp/include/lomem/version.h").read_text(encoding="utf-8")
    version = ".".join(re.findall(r"#define LOMEM_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header))
    assert lomem.__version__ == lomem._C.version == metadata.version("lomem") == version


def test_metadata_requires_the_torch_it_was_built_against():
    requirements = [r for r in metadata.requires("lomem") if "extra ==" not in r]
    assert requirements == [f"torch=={MINOR}.*"]
    assert lomem._C.torch_version == MINOR


def test_is_typed():
    assert (Path(lomem.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("version", ["2.99.0+cpu", "3.0.0", "2.1.0", "2.130.0"])
def test_import_under_another_torch_is_one_sentence(version):
    script = f"import torch; torch.__version__ = {version!r}; import lomem"
    result = run(sys.executable, "-c", script)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    built = f"lomem {lomem.__version__} was built against torch {MINOR}"
    assert last.startswith(f"ImportError: {built} and does not load under torch {version}: ")


def test_import_needs_torch_alone():
    script = (
        "import sys, lomem, lomem.commands.cli; "
        "print(sorted({'rich', 'sklearn', 'matplotlib', 'transformers', 'peft'} & sys.modules.keys()))"
    )
    assert run(sys.executable, "-c", script).stdout.strip() == "[]"


@pytest.mark.parametrize("command", [[sys.executable, "-m", "lomem"], [Path(sys.executable).with_name("lomem")]])
def test_info(command):
    result = run(*command, "info")
    assert result.returncode == 0
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in result.stdout.splitlines())
    assert rows["lomem"] == lomem.__version__
    assert rows["built against torch"] == MINOR
    assert rows["running with torch"] == torch.__version__
    assert rows["CPU kernels"] == lomem._C.cpu_capability()
    assert ("CPU-only" in rows["CUDA kernels"]) == (not lomem._C.cuda_archs())


def test_command_line_errors():
    assert "usage: lomem" in run(sys.executable, "-m", "lomem").stderr
    assert "expected a number of at least 1" in run(sys.executable, "-m", "lomem", "demo", "--seeds", "0").stderr


def test_demo(tmp_path):
    plot = tmp_path / "demo.png"
    result = run(sys.executable, "-m", "lomem", "demo", "--epochs", "1", "--seeds", "2", "--plot", plot)
    assert result.returncode == 0, result.stderr
    for row in ("saved for backward", "step time", "test accuracy", "2 seeds"):
        assert row in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_demo_without_its_packages_is_one_sentence():
    script = "import sys; sys.modules['sklearn'] = None; import lomem.commands.cli; sys.exit(lomem.commands.cli.main(['demo']))"
    result = run(sys.executable, "-c", script)
    assert result.returncode == 1
    assert re.fullmatch(
        r"lomem demo: the demo needs the package sklearn\S*: pip install 'lomem\[demo\]'\n", result.stderr
    )


@pytest.mark.parametrize(
    ("path", "wanted"), [("/nonexistent/a.png", "in a folder that exists"), ("a.doc", "that ends in one of")]
)
def test_demo_checks_the_plot_before_it_trains(path, wanted):
    result = run(sys.executable, "-m", "lomem", "demo", "--epochs", "100000", "--plot", path)
    assert result.returncode == 1
    assert result.stderr.startswith(f"lomem demo: --plot is {path}, expected a file")
    assert wanted in result.stderr
    assert result.stderr.count("\n") == 1


def test_demo_models_start_equal_and_save_less():
    from lomem.commands import demo

    data = demo.load_data()
    runs = [demo.Run(layers, data, seed=3, steps=1) for layers in demo.METHODS.values()]
    plain, ours = (r.model.state_dict() for r in runs)
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[key], ours[key]) for key in plain)
    index = torch.arange(demo.BATCH)
    # The same function: only float32 roundings of the norms differ.
    torch.testing.assert_close(runs[0].loss(index), runs[1].loss(index), rtol=1e-5, atol=1e-6)
    assert runs[1].saved_bytes(index) < 0.7 * runs[0].saved_bytes(index)


def test_torch_is_found_without_importing_it():
    result = run(sys.executable, ROOT / "cmake/lomem_torch.py")
    assert result.returncode == 0
    assert Path(result.stdout.strip()) == Path(torch.utils.cmake_prefix_path) / "Torch"


def test_no_torch_is_one_sentence(tmp_path):
    """In an environment without torch: what CMake's script says, and what the build backend shows."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty")
    metadata_hook = "import sys; sys.path.insert(0, 'cmake'); import lomem_torch; lomem_torch.dynamic_metadata({}, {})"
    for command in (["cmake/lomem_torch.py"], ["-c", metadata_hook]):
        result = run(tmp_path / "empty/bin/python", *command, cwd=ROOT)
        assert result.returncode == 1
        assert re.fullmatch(r"lomem: no torch found for \S+: install torch .*\n", result.stderr)


def test_requirements_of_wheel_and_source_distribution():
    sys.path.insert(0, str(ROOT / "cmake"))
    try:
        import lomem_torch
    finally:
        sys.path.pop(0)
    assert lomem_torch.dynamic_metadata({}, {}) == {"dependencies": [f"torch=={MINOR}.*"]}
    # Its wheels will differ from it, and from each other.
    assert lomem_torch.dynamic_wheel({}) == {"dependencies": True}
    lomem_torch.build_state("sdist")
    assert lomem_torch.dynamic_metadata({}, {}) == {"dependencies": ["torch>=2.11"]}
    lomem_torch.build_state("wheel")


def code_blocks(language, document="README.md"):
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_readme_python(capsys):
    """All blocks, in one session, with the numbers that their comments promise."""
    source = "\n".join(code_blocks("python"))
    exec(compile(source, "README.md", "exec"), {})
    promised = re.search(r"print\(saved\.nbytes\)  # (\d+), then (\d+)", source)
    assert capsys.readouterr().out.split()[-2:] == list(promised.groups())


@pytest.mark.parametrize("document", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_python_in_the_documents(document):
    source = "\n".join(code_blocks("python", f"docs/{document}"))
    exec(compile(source, document, "exec"), {})


def test_readme_cpp_against_the_wheel(tmp_path):
    """The README's program, built with find_package(lomem) from inside the installed wheel."""
    (cmake,), (program,) = code_blocks("cmake"), code_blocks("cpp")
    (tmp_path / "CMakeLists.txt").write_text(cmake)
    (tmp_path / "main.cpp").write_text(program)
    build = tmp_path / "build"
    # torch is found beside lomem, where the wheel's hint points.
    configure = run("cmake", "-S", tmp_path, "-B", build, f"-DCMAKE_PREFIX_PATH={lomem.cmake_prefix_path}")
    assert configure.returncode == 0, configure.stderr
    compiled = run("cmake", "--build", build)
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr
    ran = run(build / "app")
    assert ran.returncode == 0, ran.stderr
    linked = run("ldd", build / "app").stdout
    assert "liblomem.so" in linked
    assert "python" not in re.sub(r"\S*/site-packages/\S*", "", linked)


def test_wheel_holds_no_absolute_paths():
    folder = Path(lomem.cmake_prefix_path)
    files = list(folder.glob("**/*.cmake"))
    assert files
    for file in files:
        assert str(ROOT) not in file.read_text(encoding="utf-8"), file
        assert str(folder) not in file.read_text(encoding="utf-8"), file
