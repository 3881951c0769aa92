"""Every public name explains itself: arguments, results, errors, sources and types."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

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


@pytest.mark.parametrize(
    "function", [pytest.param(p.values[0], id=p.id) for p in PUBLIC if inspect.isfunction(p.values[0])]
)
def test_public_functions_say_what_they_return(function):
    if inspect.signature(function).return_annotation in ("None", "Iterator[None]"):
        return
    names_the_result = re.match(r"(A|The|What|Whether|Samples) |.*, or None where", function.__doc__)
    assert names_the_result or "Returns:" in function.__doc__


@pytest.mark.parametrize("thing", [p for p in PUBLIC if p.id.split(".")[0] in ("ops", "modules", "models", "losses")])
def test_what_a_paper_defines_names_it(thing):
    if thing.__name__.endswith("Output") or thing in (ops.use_backend, losses.through_frozen):
        return
    if thing in (ops.half_spectrum, ops.amplitude_and_phase):  # what every textbook defines
        return
    assert "Source: " in thing.__doc__ or "arXiv" in thing.__doc__ + inspect.getmodule(thing).__doc__


def functions_of_the_package():
    """Public functions and methods of all modules, the launchers included, with their source."""
    root = Path(mitnet_fast.__file__).parent
    for file in sorted([*root.rglob("*.py"), *(root.parent / "triton_kernels").glob("*.py")]):
        module = ast.parse(file.read_text())
        classes = [n for n in module.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
        for scope in (module, *classes):
            for function in scope.body:
                if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
                    owner = f"{scope.name}." if isinstance(scope, ast.ClassDef) else ""
                    yield f"{file.relative_to(root.parent)}: {owner}{function.name}", function


def is_kernel(function):
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_every_function_has_type_hints():
    untyped = []
    for name, function in functions_of_the_package():
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        if not is_kernel(function) and (bare or function.returns is None):
            untyped.append(f"{name} {bare}")
    assert not untyped


def raised_by(function):
    """Names of the exceptions that a function's own body raises."""
    inner = {
        n
        for child in ast.walk(function)
        if isinstance(child, ast.FunctionDef) and child is not function
        for n in ast.walk(child)
    }
    raises = [n.exc for n in ast.walk(function) if isinstance(n, ast.Raise) and n.exc is not None and n not in inner]
    return {ast.unparse(exc.func if isinstance(exc, ast.Call) else exc) for exc in raises}


def test_functions_that_raise_say_so():
    silent = []
    for name, function in functions_of_the_package():
        if name.startswith("mitnet_fast/cli.py"):  # whose docstrings are the commands' help
            continue
        text = ast.get_docstring(function) or ""
        if (raised := raised_by(function) - {"AssertionError"}) and not re.search("Raises?|[Ee]rror", text):
            silent.append(f"{name}: {raised}")
    assert not silent
