"""Who imports whom: arrows between the packages point one way, and kernels know nothing of PyTorch's headers."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# what each part may import of ours, besides itself; the rest of the package (cli, verify, …) stands above all of these
ALLOWED = {
    "reference": set(),
    "triton_kernels": set(),
    "ops": {"reference", "triton_kernels"},
    "modules": {"ops", "reference"},
    "models": {"modules", "ops", "reference"},
    "losses": {"models", "modules", "ops"},
    "data": set(),
    "training": {"data", "losses", "models", "modules", "ops", "weights", "evaluation"},
}
HELPERS = {"_extension", "__version__"}


def imported(file: Path) -> set[str]:
    """Parts of mitnet_fast that a file imports, wherever in it."""
    package = ("mitnet_fast", *file.relative_to(ROOT).with_suffix("").parts)
    package = package[1:] if package[1] == "mitnet_fast" else package
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("mitnet_fast.")}


@pytest.mark.parametrize("part", ALLOWED)
def test_nothing_points_up(part):
    folder = ROOT / part if part == "triton_kernels" else ROOT / "mitnet_fast" / part
    files = sorted(folder.rglob("*.py"))
    assert files
    found = {file.name: imported(file) - {part} - HELPERS for file in files}
    assert {name: parts - ALLOWED[part] for name, parts in found.items() if parts - ALLOWED[part]} == {}


def test_kernels_include_no_header_of_pytorch():
    sources = [file for file in (ROOT / "csrc").rglob("*") if file.suffix in (".cu", ".cuh")]
    sources += (ROOT / "csrc").rglob("*_cpu_kernels.cpp")
    assert len(sources) > 20
    for source in sources:
        found = set(re.findall(r"#include\s+[<\"]((?:torch|pybind11|Python|ATen|c10)[^>\"]*)", source.read_text()))
        vectors = {name for name in found if name.startswith("ATen/cpu/vec/")}
        assert found <= vectors, source


def test_no_setting_of_tf32_is_read_that_raises_after_the_new_one_was_used():
    for folder in ("mitnet_fast", "triton_kernels", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            assert "allow_tf32" not in file.read_text(), file
