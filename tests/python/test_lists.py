"""Lists that are written by hand name everything that belongs there: nothing else would fail without an entry."""

import re

from test_contributing import FILES, ROOT


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def test_every_header_is_compiled_by_itself():
    listed = read("tests/cpp/CMakeLists.txt")
    headers = [path.removeprefix("cpp/include/") for path in FILES if re.match(r"cpp/include/lomem/.*\.(h|cuh)$", path)]
    assert len(headers) > 20
    needs_cuda = {"lomem/cuda/kernels.h"}
    assert {header for header in headers if header not in listed} == needs_cuda


def test_the_cuda_ops_of_every_family_run_on_the_cpu():
    included = set(re.findall(r'#include "\.\./\.\./\.\./(cpp/cuda/\w+\.cpp)"', read("tests/cpp/cuda/on_host.cpp")))
    assert included == {path for path in FILES if re.match(r"cpp/cuda/\w+\.cpp$", path)}


def test_every_file_of_op_tests_runs_with_other_kernels():
    """OP_TESTS in the Makefile: files that test ops on each device, but for those of ops without kernels."""
    words = re.search(r"^OP_TESTS := ((?:.*\\\n)*.*)", read("Makefile"), re.MULTILINE)[1]
    listed = set(re.findall(r"(\w+)\.py", words))
    per_device = {
        path.split("test_", 1)[1].removesuffix(".py")
        for path in FILES
        if path.startswith("tests/python/test_")
        and re.search(r"^def test_\w+\([^)]*\bdevice\b", read(path), re.MULTILINE)
    }
    without_kernels = {name for name in per_device if name.startswith(("randomized_", "convert_"))} | {
        "errors",
        "lora",
        "mapping",
    }
    assert per_device - without_kernels <= listed
    assert without_kernels.isdisjoint(listed)
