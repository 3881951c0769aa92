"""The compiled half: what setup.py builds in every mode, and that it runs on older processors than this one."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from mitnet_fast import _C

ROOT = Path(__file__).parent.parent
INHERITED = ("HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


def build(tmp_path, path=os.environ["PATH"], **environment):
    """Run setup.py into ``tmp_path``; the answer and the extension, if there is one."""
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        tmp_path / "lib",
        "--build-temp",
        tmp_path / "temp",
    ]
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    answer = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**inherited, "PATH": path, **environment}
    )
    return answer, next((tmp_path / "lib").rglob("_C*.so"), None)


def program(folder, name, script):
    """A program that runs ``script``, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return folder / name


def test_none_builds_nothing(tmp_path):
    answer, extension = build(tmp_path, MITNET_FAST_BUILD="NONE")
    assert answer.returncode == 0, answer.stderr
    assert extension is None


def test_auto_without_a_compiler_builds_nothing_and_says_so(tmp_path):
    answer, extension = build(tmp_path, path="/nowhere", MITNET_FAST_BUILD="auto")
    assert answer.returncode == 0, answer.stderr
    assert "no C++ compiler found, building without the compiled half" in answer.stderr
    assert extension is None


def test_auto_with_a_compiler_that_fails_builds_nothing_and_says_so(tmp_path):
    broken = program(tmp_path, "c++", "exit 1")
    cuda = fake_cuda(tmp_path / "cuda")  # a real one would compile all kernels first
    answer, extension = build(tmp_path, CXX=str(broken), CUDA_HOME=cuda, MITNET_FAST_BUILD="auto")
    assert answer.returncode == 0, answer.stderr
    assert "the compiled half could not be built and is left out" in answer.stderr
    assert extension is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MITNET_FAST_BUILD": "gpu"}, "MITNET_FAST_BUILD: got 'gpu', allowed are auto, cpu, cuda, none"),
        ({"MITNET_FAST_BUILD": "cpu", "path": "/nowhere"}, "MITNET_FAST_BUILD=cpu: no C++ compiler"),
    ],
)
def test_what_cannot_be_built_is_an_error(tmp_path, environment, message):
    answer, extension = build(tmp_path, **environment)
    assert answer.returncode != 0
    assert message in answer.stderr
    assert extension is None


def fake_cuda(folder):
    """A toolkit whose compiler knows its version and compiles nothing."""
    program(
        folder / "bin",
        "nvcc",
        'case "$*" in *--version*) echo "Cuda compilation tools, release 13.0";; *) exit 1;; esac',
    )
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").touch()
    return str(folder)


@pytest.mark.exhaustive
def test_cuda_that_does_not_compile_is_an_error_where_it_is_insisted_on(tmp_path):
    answer, extension = build(tmp_path, CUDA_HOME=fake_cuda(tmp_path / "cuda"), MITNET_FAST_BUILD="cuda")
    assert answer.returncode != 0
    assert extension is None


def test_a_wrong_architecture_is_an_error(tmp_path):
    environment = {"CUDA_HOME": fake_cuda(tmp_path / "cuda"), "TORCH_CUDA_ARCH_LIST": "8.0;sm_90"}
    answer, _ = build(tmp_path, **environment)
    assert answer.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST: got 'sm_90', expected entries such as 8.0, 9.0a or 10.0+PTX" in answer.stderr


def run_elsewhere(extension, code, **environment):
    """Run ``code`` in a new process in which ``extension`` is loaded as ``_C``."""
    load = (
        "import importlib.util, torch\n"
        f"spec = importlib.util.spec_from_file_location('mitnet_fast._C', {str(extension)!r})\n"
        "_C = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(_C)\n"
        "torch.manual_seed(0)\n"
        "x, f, w = torch.randn(2, 3, 40, 50), torch.randn(2, 5, 40, 50), torch.randn(27, 5)\n"
        "y = _C.predicted_dynamic_filter_forward(x, f, w, None, True, False)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", load + code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize("debug", ["0", "1"])
def test_the_cpu_half_builds_and_computes(tmp_path, debug):
    answer, extension = build(tmp_path, MITNET_FAST_BUILD="cpu", DEBUG=debug)
    assert answer.returncode == 0, answer.stderr
    code = (
        "print(_C.build_info()['debug'], _C.build_info()['cuda'], _C.cuda_devices(), float(y.double().square().sum()))"
    )
    printed = run_elsewhere(extension, code).split()
    assert printed[:3] == [str(debug == "1"), "None", "[]"]
    expected = float(run_elsewhere(_C.__file__, "print(float(y.double().square().sum()))"))
    assert float(printed[3]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.exhaustive
def test_auto_keeps_the_cpu_half_when_cuda_does_not_compile(tmp_path):
    answer, extension = build(tmp_path, CUDA_HOME=fake_cuda(tmp_path / "cuda"), MITNET_FAST_BUILD="auto")
    assert answer.returncode == 0, answer.stderr
    assert "the CUDA half does not compile here and is left out" in answer.stderr
    assert run_elsewhere(extension, "print(_C.build_info()['cuda'])").split() == ["None"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ["cpu", "none"])
def test_a_wheel_holds_all_packages_and_the_extension_of_its_mode(tmp_path, mode):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-index",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        tmp_path,
        ROOT,
    ]
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MITNET_FAST_BUILD": mode})
    assert answer.returncode == 0, answer.stderr
    shutil.unpack_archive(next(tmp_path.glob("*.whl")), tmp_path / "unpacked", "zip")
    for name in (
        "mitnet_fast/ops/preferences.json",
        "mitnet_fast/triton_kernels/dynamic_filter.py",
        "mitnet_fast/py.typed",
    ):
        assert (tmp_path / "unpacked" / name).is_file()
    assert len(list((tmp_path / "unpacked" / "mitnet_fast").glob("_C*.so"))) == (mode == "cpu")


def instructions_by_function():
    """Function to (mnemonic, operands) of all of its instructions, from the extension's disassembly."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", _C.__file__], capture_output=True, text=True, check=True
    )
    functions = defaultdict(list)
    for line in listing.stdout.splitlines():
        if start := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            name = start.group(1)
        elif instruction := re.fullmatch(r" +[0-9a-f]+:\t(\S+) *(.*)", line):
            functions[name].append(instruction.groups())
    return functions


def test_wide_instructions_stay_in_the_code_that_is_chosen_for_them():
    """Inline functions of headers must not carry them into code that every processor runs."""
    bmi = {"andn", "bextr", "blsi", "blsr", "bzhi", "mulx", "pdep", "pext", "rorx", "sarx", "shlx", "shrx"}
    needs = defaultdict(set)
    for function, instructions in instructions_by_function().items():
        capability = next((name for name in ("AVX512", "AVX2") if name in function), "DEFAULT")
        for mnemonic, operands in instructions:
            if re.search(r"zmm|%k[0-7]|mm(1[6-9]|2\d|3[01])\b", operands):
                needs[capability].add("AVX512")
            elif mnemonic.startswith("v") or "ymm" in operands or mnemonic in bmi:
                needs[capability].add("AVX2")
    intel = platform.machine() in ("x86_64", "AMD64")
    assert needs == ({"AVX2": {"AVX2"}, "AVX512": {"AVX2", "AVX512"}} if intel else {})


def test_threads_are_those_of_pytorch():
    """A second OpenMP runtime would have threads of its own, which torch.set_num_threads does not reach."""
    needed = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed
    assert "omp" not in needed
    wanted = subprocess.run(["nm", "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True)
    assert "GOMP_parallel" in wanted.stdout


def test_build_information():
    info = _C.build_info()
    assert info["torch"] == torch.__version__
    assert re.match(r"\d+\.\d+", info["compiler"])
    assert (info["cuda"] is None) == (info["cuda_architectures"] == "")
    assert importlib.util.find_spec("mitnet_fast._C").origin == _C.__file__
