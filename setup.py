"""Builds mitnet_fast and its compiled half, mitnet_fast._C.

    pip install --no-build-isolation -e .

MITNET_FAST_BUILD      auto (default): CUDA when nvcc is found, else the CPU half, else none;
                       cpu, cuda: exactly that, or an error; none: no compiled half
TORCH_CUDA_ARCH_LIST   such as "8.0;9.0a"; the default covers Ampere, Hopper and Blackwell
CUDA_HOME, MAX_JOBS, DEBUG, CXX as usual

No GPU is looked for: a machine without one builds for all.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler, include_paths

ROOT = Path(__file__).parent
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"
MODES = ("auto", "cpu", "cuda", "none")
# Instruction sets under PyTorch's names; csrc/common/cpu_capability.cpp chooses one at run time
CPU_CAPABILITIES = {"DEFAULT": "-DCPU_CAPABILITY_DEFAULT"}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_CAPABILITIES["AVX2"] = "-DCPU_CAPABILITY_AVX2 -mavx2 -mfma -mf16c"
    CPU_CAPABILITIES["AVX512"] = "-DCPU_CAPABILITY_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"


def find_cuda_home() -> Path | None:
    """The folder of a CUDA toolkit with nvcc: CUDA_HOME, then PATH, then pip's nvidia packages."""
    on_path = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [str(Path(on_path).resolve().parent.parent)] if on_path else []
    candidates += ["/usr/local/cuda"]
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    candidates += [str(folder) for folder in sorted(packages.glob("cu[0-9]*"), reverse=True)]
    candidates += [str(packages / "cuda_nvcc")]
    for candidate in candidates:
        if candidate and (Path(candidate) / "bin" / "nvcc").is_file() and cudart_folder(Path(candidate)):
            return Path(candidate)
    return None


def cudart_folder(cuda_home: Path) -> Path | None:
    """Where the static CUDA runtime lies, None when the toolkit comes without it."""
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (cuda_home / folder / "libcudart_static.a").is_file():
            return cuda_home / folder
    return None


def nvcc_version(cuda_home: Path) -> str:
    """Release of the toolkit's nvcc, such as "13.0"."""
    printed = subprocess.run([cuda_home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True)
    return re.search(r"release (\d+\.\d+)", printed.stdout).group(1)


def architectures() -> list[str]:
    """Entries of TORCH_CUDA_ARCH_LIST, checked, such as ["8.0", "9.0a", "10.0+PTX"]."""
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    entries = re.split(r"[;,\s]+", chosen.strip(";, "))
    for entry in entries:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
            sys.exit(f"TORCH_CUDA_ARCH_LIST: got {entry!r}, expected entries such as 8.0, 9.0a or 10.0+PTX")
    return entries


def gencode(entries: list[str]) -> list[str]:
    """nvcc's -gencode flags."""
    flags = []
    for entry in entries:
        number = entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def escaped(path: Path | str) -> str:
    """A path as ninja's build lines take it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


class BuildWithKernels(BuildExtension):
    """Compiles the kernels, whose flags differ from file to file, then lets PyTorch's builder do the rest.

    Kernels for the CPU (``*_cpu_kernels.cpp``) are compiled once per instruction set, those for CUDA
    by nvcc. The latter include no PyTorch header, so a CPU build of PyTorch is enough to build them.
    """

    def build_extensions(self) -> None:
        extension = self.extensions[0]
        try:
            cuda_objects = self.compile_cuda_kernels() if cuda_home else []
            if cuda_objects:
                extension.define_macros += [
                    ("MITNET_FAST_WITH_CUDA", None),
                    ("MITNET_FAST_CUDA_VERSION", f'"{nvcc_version(cuda_home)}"'),
                    ("MITNET_FAST_CUDA_ARCHITECTURES", f'"{";".join(architectures())}"'),
                ]
                # static: the extension then loads on machines without a CUDA toolkit
                extension.extra_link_args += [
                    f"-L{cudart_folder(cuda_home)}", "-lcudart_static", "-lrt", "-ldl", "-lpthread",
                ]  # fmt: skip
            extension.extra_objects = self.compile_cpu_kernels() + cuda_objects
            super().build_extensions()
        except Exception as error:
            if mode != "auto":
                raise
            print(f"mitnet_fast: the compiled half could not be built and is left out: {error}", file=sys.stderr)

    def compile_cpu_kernels(self) -> list[str]:
        """Objects of the CPU kernels, the narrowest instruction set first.

        Of an inline function that no namespace keeps apart, the linker takes the first copy.
        """
        includes = [f"-I{shlex.quote(str(path))}" for path in (ROOT / "csrc", *include_paths())]
        command = (
            f"{get_cxx_compiler()} -std=c++20 -fPIC -fvisibility=hidden -Wno-psabi {' '.join(OPTIMISATION + includes)}"
        )
        return self.compile(
            "cpu_kernels",
            command,
            {
                f"{source.stem}_{capability}.o": (source, f"-DCPU_CAPABILITY={capability} {flags}")
                for capability, flags in CPU_CAPABILITIES.items()
                for source in cpu_kernels
            },
        )

    def compile_cuda_kernels(self) -> list[str]:
        """Objects of the CUDA sources; none where they do not compile and are not insisted on."""
        flags = [
            "-std=c++17", "--expt-relaxed-constexpr", "-lineinfo", "-Xcompiler", "-fPIC",
            "-Xcompiler", "-fvisibility=hidden", *OPTIMISATION, *gencode(architectures()),
        ]  # fmt: skip
        nvcc = shlex.quote(str(cuda_home / "bin" / "nvcc"))
        command = f"{nvcc} {' '.join(flags)} -I{shlex.quote(str(ROOT / 'csrc'))}"
        names = {source: f"{'_'.join(source.relative_to(ROOT / 'csrc').parts)}.o" for source in cuda_sources}
        try:
            return self.compile("cuda_kernels", command, {name: (source, "") for source, name in names.items()})
        except subprocess.CalledProcessError:
            if mode == "cuda":
                raise
            print("mitnet_fast: the CUDA half does not compile here and is left out", file=sys.stderr)
            return []

    def compile(self, name: str, command: str, objects: dict[str, tuple[Path, str]]) -> list[str]:
        """Compile every object from its source with its flags by ninja, in a folder of this name."""
        folder = Path(self.build_temp).resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["rule compile", f"  command = {command} $flags -MD -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc"]
        for target, (source, flags) in objects.items():
            lines += [f"build {escaped(folder / target)}: compile {escaped(source)}", f"  flags = {flags}"]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder), *jobs], check=True)
        return [str(folder / target) for target in objects]


mode = os.environ.get("MITNET_FAST_BUILD", "auto").lower()
if mode not in MODES:
    sys.exit(f"MITNET_FAST_BUILD: got {mode!r}, allowed are {', '.join(MODES)}")
debug = os.environ.get("DEBUG", "0").lower() in ("1", "on", "true", "yes")
has_compiler = bool(shutil.which(os.environ.get("CXX", "c++").split()[0]) or shutil.which("g++"))
if mode == "auto" and not has_compiler:
    print("mitnet_fast: no C++ compiler found, building without the compiled half", file=sys.stderr)
    mode = "none"
if mode in ("cpu", "cuda") and not has_compiler:
    sys.exit(f"MITNET_FAST_BUILD={mode}: no C++ compiler (CXX, or c++ or g++ on PATH)")
cuda_home = find_cuda_home() if mode in ("auto", "cuda") else None
if mode == "cuda" and cuda_home is None:
    sys.exit("MITNET_FAST_BUILD=cuda: no nvcc with a static CUDA runtime in CUDA_HOME, on PATH or in pip's packages")

OPTIMISATION = ["-O0", "-g", "-UNDEBUG"] if debug else ["-O3", "-DNDEBUG"]
cpu_kernels = sorted((ROOT / "csrc").rglob("*_cpu_kernels.cpp"))
cuda_sources = sorted((ROOT / "csrc").rglob("*.cu"))
extensions = []
if mode != "none":
    sources = sorted(set((ROOT / "csrc").rglob("*.cpp")) - set(cpu_kernels))
    headers = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh"))
    depends = [*headers, *cpu_kernels, *(cuda_sources if cuda_home else []), Path(__file__)]
    extensions = [
        CppExtension(
            "mitnet_fast._C",
            [str(path.relative_to(ROOT)) for path in sources],
            include_dirs=[str(ROOT / "csrc")],
            define_macros=[("MITNET_FAST_TORCH_VERSION", f'"{torch.__version__}"')],
            # -fopenmp for the compiler alone: the runtime has to be the one that PyTorch brings and has loaded
            extra_compile_args=["-fopenmp", "-fvisibility=hidden", *OPTIMISATION, *([] if debug else ["-g0"])],
            extra_link_args=[],
            depends=[str(path) for path in depends],
            optional=mode == "auto",
        )
    ]

setup(
    version=re.search(r'__version__ = "(.+)"', (ROOT / "mitnet_fast" / "__init__.py").read_text()).group(1),
    packages=[
        "mitnet_fast",
        *(f"mitnet_fast.{path.parent.name}" for path in sorted((ROOT / "mitnet_fast").glob("*/__init__.py"))),
        "mitnet_fast.benchmarks",
        "mitnet_fast.triton_kernels",
    ],
    # bare names are everybody's: triton_kernels belongs to another project on PyPI
    package_dir={"mitnet_fast.benchmarks": "benchmarks", "mitnet_fast.triton_kernels": "triton_kernels"},
    package_data={
        "mitnet_fast": ["py.typed", "*.json"],
        "mitnet_fast.ops": ["*.json"],
        "mitnet_fast.triton_kernels": ["tuned/*.json"],
    },
    ext_modules=extensions,
    cmdclass={"build_ext": BuildWithKernels},
)
