"""Every public name explains itself, and the kernel functions name every argument."""

import importlib
import inspect
import pkgutil

import pytest

import mitnet_fast
from mitnet_fast import losses, models, modules, ops


def modules_of_the_package():
    for entry in pkgutil.walk_packages(mitnet_fast.__path__, "mitnet_fast."):
        parts = entry.name.split(".")[1:]
        if not any(part.startswith("_") for part in parts) and parts[0] != "triton_kernels":
            yield entry.name


@pytest.mark.parametrize("name", list(modules_of_the_package()))
def test_everything_public_has_a_docstring(name):
    module = importlib.import_module(name)
    assert module.__doc__, name
    silent = []
    for label, value in vars(module).items():
        if label.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isfunction(value) and not value.__doc__:
            silent.append(label)
        if inspect.isclass(value):
            methods = [
                f"{label}.{method}"
                for method, function in vars(value).items()
                if not method.startswith("_")
                and inspect.isfunction(function)
                and not inspect.getdoc(getattr(value, method))
            ]
            silent += [*([label] if not value.__doc__ else []), *methods]
    assert not silent


@pytest.mark.parametrize("package", [ops, modules, models, losses])
def test_what_is_exported_exists_and_is_sorted_into_all(package):
    assert sorted(package.__all__) == sorted(set(package.__all__))
    for name in package.__all__:
        assert hasattr(package, name), name


@pytest.mark.parametrize(
    "function",
    [getattr(ops, name) for name in ops.__all__ if inspect.isfunction(getattr(ops, name))],
    ids=lambda function: function.__name__,
)
def test_operators_document_every_argument(function):
    for argument in inspect.signature(function).parameters:
        assert f"{argument}:" in function.__doc__ or f"{argument.removesuffix('s')}:" in function.__doc__, argument
    assert "Raises:" in function.__doc__
