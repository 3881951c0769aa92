"""Every public name explains itself, and the kernel functions name every argument."""

import importlib
import inspect
import pkgutil
import re

import pytest
from pydantic import BaseModel

import mitnet_fast
from mitnet_fast import data, losses, models, modules, ops, training


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


@pytest.mark.parametrize("package", [ops, modules, models, losses, data, training])
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


PUBLIC = [
    pytest.param(value, id=f"{package.__name__.removeprefix('mitnet_fast.')}.{name}")
    for package in (ops, modules, models, losses, data, training)
    for name in package.__all__
    for value in [getattr(package, name)]
    if inspect.isfunction(value) or (inspect.isclass(value) and not issubclass(value, (Exception, BaseModel)))
]


@pytest.mark.parametrize("thing", PUBLIC)
def test_public_functions_and_classes_document_every_argument(thing):
    bases = thing.__mro__ if inspect.isclass(thing) else [thing]
    text = "\n".join(base.__doc__ or "" for base in bases if base.__module__.startswith("mitnet_fast"))
    named = set(re.findall(r"^ *((?:\w+, )*\w+):", text, re.MULTILINE))
    documented = {word for names in named for word in names.split(", ")}
    parameters = inspect.signature(thing).parameters.values()
    arguments = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    assert arguments <= documented
