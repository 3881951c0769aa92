"""What every compiled backend of every operator must do, drawn from the operators' specifications."""

import itertools
import statistics
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_utils import CrossRefFakeMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from mitnet_fast import ops
from mitnet_fast.ops._backends import why_not
from mitnet_fast.specs import SPECS, compare, outputs_and_gradients
from mitnet_fast.verify import KERNELS, poisoned_memory

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# every (operator, backend, device) that can run here; the Triton interpreter has slow tests of its own
RUNNABLE = [
    pytest.param(spec, backend, device, id=f"{spec.name}-{backend}-{device}")
    for spec in SPECS
    for backend, device in itertools.product(("cpp", "triton"), DEVICES)
    if (backend, device) != ("triton", "cpu") and not why_not(KERNELS[spec.name], backend, device, torch.float32)
]
every_kernel = pytest.mark.parametrize(("spec", "backend", "device"), RUNNABLE)


def dtypes_of(spec, backend, device):
    return sorted(KERNELS[spec.name].dtypes[backend, device], key=str)


def typical(spec, dtype=torch.float32, layout="contiguous"):
    return replace(spec.typical, dtype=dtype, layout=layout)


def total(results):
    return sum(result.sum() for result in tree_leaves(results))


def same(results, others):
    return all(torch.equal(*pair) for pair in zip(tree_leaves(results), tree_leaves(others), strict=True))


def required(results):
    return [str(result) for result in results if not result.passed]


@every_kernel
def test_every_case_dtype_and_layout_equals_the_truth(spec, backend, device):
    with poisoned_memory():
        for case in spec.cases:
            for variant in spec.dtypes_and_layouts(case, dtypes_of(spec, backend, device)):
                failed = required(compare(spec, variant, backend, device))
                assert not failed, f"{variant}: {failed}"


def sweep(spec, backend, device, cases):
    ratios = []
    with poisoned_memory():
        for seed in range(cases):
            case = spec.random_case(seed, dtypes_of(spec, backend, device))
            results = compare(spec, case, backend, device)
            failed = required(results)
            assert not failed, f"{case}: {failed}"
            ratios += [result.ratio for result in results if case.dtype != torch.float64 and result.eager_error]
    assert statistics.median(ratios) <= 1.5


@every_kernel
def test_random_cases_equal_the_truth(spec, backend, device):
    sweep(spec, backend, device, 60)


@pytest.mark.exhaustive
@every_kernel
def test_a_thousand_random_cases_equal_the_truth(spec, backend, device):
    sweep(spec, backend, device, 1000)


@every_kernel
def test_every_pattern_of_wanted_gradients(spec, backend, device):
    case = typical(spec)
    names = [name for name, shape in spec.shapes(case).items() if shape is not None]
    for wanted in itertools.product((False, True), repeat=len(names)):
        needs = dict(zip(names, wanted, strict=True))
        results = compare(spec, case, backend, device, needs)
        assert {result.tensor for result in results} == {
            *spec.results,
            *(f"grad_{name}" for name in names if needs[name]),
        }
        assert not required(results), f"{needs}: {required(results)}"


@every_kernel
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_result_keeps_the_layout_and_aliases_nothing(spec, backend, device, layout):
    case = typical(spec, layout=layout)
    tensors = spec.inputs(case, device)
    before = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
    results = tree_leaves(spec.run(case, tensors, backend))
    format_of = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    for y in results:
        assert y.dim() != 4 or y.is_contiguous(memory_format=format_of)
        assert all(y.data_ptr() != tensor.data_ptr() for tensor in tensors.values() if tensor is not None)
    for name, value in before.items():
        assert torch.equal(tensors[name], value)


@every_kernel
def test_the_same_call_gives_the_same_bits(spec, backend, device):
    case = typical(spec)
    tensors = spec.inputs(case, device)
    gradient = spec.gradient(case, spec.run(case, tensors, backend))
    first, second = (outputs_and_gradients(spec, case, tensors, gradient, backend) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@every_kernel
def test_a_gradient_of_any_layout_is_read_as_it_lies(spec, backend, device):
    case = typical(spec)
    tensors = spec.inputs(case, device)
    gradient = spec.gradient(case, spec.run(case, tensors, backend))
    expected = outputs_and_gradients(spec, case, tensors, gradient, backend)
    layouts = {
        "half of a concatenation": lambda g: torch.cat([g, torch.full_like(g, float("nan"))], 1)[:, : g.shape[1]],
        "channels_last": lambda g: g.contiguous(memory_format=torch.channels_last),
        "transposed": lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for layout, lay_out in layouts.items():
        laid_out = tree_map(lambda g, lay_out=lay_out: lay_out(g) if g.dim() == 4 else g, gradient)
        actual = outputs_and_gradients(spec, case, tensors, laid_out, backend)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=f"{layout}: {name}")
    ones = outputs_and_gradients(spec, case, tensors, tree_map(torch.ones_like, gradient), backend)
    one_value = tree_map(lambda g: g.new_ones(()).expand(g.shape), gradient)
    expanded = outputs_and_gradients(spec, case, tensors, one_value, backend)
    for name, value in ones.items():
        torch.testing.assert_close(expanded[name], value, rtol=1e-5, atol=1e-5)


@every_kernel
def test_opcheck_finds_nothing(spec, backend, device):
    for layout, decided in itertools.product(("contiguous", "channels_last", "strided"), spec.decided):
        case = typical(spec, layout=layout)
        tensors = [t if t is None else t.requires_grad_() for t in spec.inputs(case, device).values()]
        operator = getattr(torch.ops.mitnet_fast, spec.name).default
        torch.library.opcheck(operator, (*tensors, *case.options.values(), *decided, backend))


@every_kernel
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_results_are_laid_out_as_the_fake_kernels_say(spec, backend, device, layout):
    """Those of the backward too, and where weights are in channels_last, as they are in a network that is."""
    case = typical(spec, layout=layout)
    tensors = spec.inputs(case, device)
    if layout == "channels_last":
        tensors |= {
            name: tensor.contiguous(memory_format=torch.channels_last)
            for name, tensor in tensors.items()
            if tensor is not None and tensor.dim() == 4
        }
    gradient = spec.gradient(case, spec.uninitialized(case, device))
    operators = spec.name, f"{spec.name}_backward"
    checked = []

    def is_anothers(function):
        checked.append(function.overloadpacket.__name__)
        return checked[-1] not in operators

    with CrossRefFakeMode(ignore_op_fn=is_anothers, check_aliasing=False, only_check_ops_with_meta=False):
        outputs_and_gradients(spec, case, tensors, gradient, backend)
    assert set(operators) <= set(checked)


@every_kernel
def test_it_compiles_as_one_graph(spec, backend, device):
    torch.compiler.reset()  # `step` is the same code for all operators, and may be compiled a few times only
    case = typical(spec)
    tensors = spec.inputs(case, device)
    gradient = spec.gradient(case, spec.run(case, tensors, backend))
    expected = outputs_and_gradients(spec, case, tensors, gradient, backend)

    def step(**arguments):
        return tree_map(lambda y: 2 * y, getattr(ops, spec.name)(**arguments, **case.options, backend=backend))

    leaves = {name: t if t is None else t.clone().requires_grad_() for name, t in tensors.items()}
    doubled = tree_leaves(torch.compile(step, fullgraph=True, backend="aot_eager")(**leaves))
    torch.autograd.backward(doubled, [g / 2 for g in tree_leaves(gradient)])
    for name, y in zip(spec.results, doubled, strict=True):
        torch.testing.assert_close(y / 2, expected[name])
    for name, leaf in leaves.items():
        if leaf is not None:
            torch.testing.assert_close(leaf.grad, expected[f"grad_{name}"])


class Call(torch.nn.Module):
    """One call as a module, which is what export takes."""

    def __init__(self, spec, case, backend):
        super().__init__()
        self.spec, self.case, self.backend = spec, case, backend

    def forward(self, tensors):
        return self.spec.run(self.case, tensors, self.backend)


@every_kernel
def test_it_exports(spec, backend, device):
    case = typical(spec)
    tensors = spec.inputs(case, device)
    call = Call(spec, case, backend)
    program = torch.export.export(call, (tensors,))
    assert f"mitnet_fast.{spec.name}" in str(program.graph)
    torch.testing.assert_close(program.module()(tensors), call(tensors))


@every_kernel
def test_activation_checkpointing_gives_the_same_gradients(spec, backend, device):
    case = typical(spec)
    tensors = spec.inputs(case, device)
    gradient = spec.gradient(case, spec.run(case, tensors, backend))
    expected = outputs_and_gradients(spec, case, tensors, gradient, backend)
    leaves = {name: t if t is None else t.clone().requires_grad_() for name, t in tensors.items()}
    results = tree_leaves(checkpoint(lambda: spec.run(case, leaves, backend), use_reentrant=False))
    torch.autograd.backward(results, tree_leaves(gradient))
    for name, leaf in leaves.items():
        if leaf is not None:
            assert torch.equal(leaf.grad, expected[f"grad_{name}"])


@every_kernel
def test_second_derivatives_are_a_clear_error(spec, backend, device):
    case = typical(spec)
    tensors = {n: t if t is None else t.requires_grad_() for n, t in spec.inputs(case, device).items()}
    image = tensors[spec.maps[0]]
    (first,) = torch.autograd.grad(total(spec.run(case, tensors, backend)), image, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative; use backend='reference'"):
        first.sum().backward()
    (exact,) = torch.autograd.grad(total(spec.run(case, tensors, "reference")), image, create_graph=True)
    exact.square().sum().backward()


@every_kernel
def test_function_transforms_run_on_the_reference_only(spec, backend, device):
    case = typical(spec)
    tensors = spec.inputs(case, device)
    image = tensors[spec.maps[0]]

    def run(replaced, name=None):
        return total(spec.run(case, tensors | {spec.maps[0]: replaced}, name))

    leaf = image.clone().requires_grad_()
    (expected,) = torch.autograd.grad(run(leaf, "reference"), leaf)
    torch.testing.assert_close(torch.func.grad(run)(image), expected)
    pair = torch.stack([image, 2 * image])
    torch.testing.assert_close(torch.func.vmap(run)(pair), torch.stack([run(one, "reference") for one in pair]))
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(ops.BackendError, match=r"torch\.func transforms reach through plain PyTorch only"):
            transform(lambda replaced: run(replaced, backend))(pair if transform is torch.func.vmap else image)


@every_kernel
def test_autocast_casts_as_for_a_convolution_or_computes_in_float32(spec, backend, device):
    case = typical(spec)
    tensors = spec.inputs(case, device)
    rounded = {name: t if t is None else t.bfloat16() for name, t in tensors.items()}
    with torch.autocast(device, dtype=torch.bfloat16):
        y = spec.run(case, tensors, backend)
        of_rounded = spec.run(case, rounded, backend)
    if spec.casts_like_convolution:
        assert torch.bfloat16 in dtypes_of(spec, backend, device)
        assert same(y, spec.run(case, rounded, backend))
        assert same(of_rounded, y)
    else:
        widened = {name: t if t is None else t.float() for name, t in rounded.items()}
        assert same(y, spec.run(case, tensors, backend))
        assert same(of_rounded, tree_map(torch.Tensor.bfloat16, spec.run(case, widened, backend)))
