"""Half spectrum, amplitude and phase, and recombination as registered operators."""

import pytest
import torch

from mitnet_fast import ops, reference
from mitnet_fast.models import MITNet

OPERATORS = {"half_spectrum": 1, "amplitude_and_phase": 1, "recombine": 2}
every_operator = pytest.mark.parametrize("name", OPERATORS)
SIZES = [(1, 1), (1, 2), (2, 1), (3, 4), (4, 3), (5, 7), (6, 8), (24, 20)]


def images(name, shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(OPERATORS[name])]


def results(function, inputs, seed=5):
    """Outputs and gradients, for random incoming ones."""
    leaves = [image.detach().requires_grad_() for image in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output) for output in outputs]
    grads = torch.autograd.grad(outputs, leaves, weights)
    return [*(output.detach() for output in outputs), *grads]


@every_operator
@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_of_autograd_through_the_reference(name, size):
    inputs = images(name, (2, 3, *size))
    actual, expected = (results(getattr(of, name), inputs) for of in (ops, reference))
    for value, truth in zip(actual, expected, strict=True):  # of one pixel the phase has no gradient: noise of 1e-15
        assert (value - truth).norm() <= 1e-12 * (1 + truth.norm())


@every_operator
@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6), (0, 3, 4, 6), (1, 2, 3, 4, 6)])
def test_any_number_of_dimensions(name, shape):
    for value, truth in zip(*(results(getattr(of, name), images(name, shape)) for of in (ops, reference)), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)


@every_operator
def test_layouts_and_expanded_gradients(name):
    inputs = images(name, (2, 3, 5, 6))
    expected = results(getattr(ops, name), inputs)
    channels_last = [image.contiguous(memory_format=torch.channels_last) for image in inputs]
    wide = [torch.cat([image, image], 3)[..., :6] for image in inputs]
    for laid_out in (channels_last, wide):
        for value, truth in zip(results(getattr(ops, name), laid_out), expected, strict=True):
            assert value.is_contiguous()
            torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)
    leaves = [image.requires_grad_() for image in inputs]
    outputs = getattr(ops, name)(*leaves)
    first = outputs[0] if isinstance(outputs, tuple) else outputs  # the other output has no gradient at all
    through_sum = torch.autograd.grad(first.sum(), leaves, retain_graph=True, allow_unused=True)
    through_ones = torch.autograd.grad(first, leaves, torch.ones_like(first), allow_unused=True)
    for value, truth in zip(through_sum, through_ones, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)


@every_operator
@pytest.mark.parametrize("size", [(5, 7), (24, 20), (96, 80)])
def test_bits_do_not_depend_on_where_the_inputs_lie(name, size):
    inputs = images(name, (1, 3, *size), torch.float32)
    expected = results(getattr(ops, name), inputs)
    for offset in (0, 1, 4, 8, 15):
        moved = [torch.empty(i.numel() + offset)[offset:].view(i.shape).copy_(i) for i in inputs]
        for value, truth in zip(results(getattr(ops, name), moved), expected, strict=True):
            assert torch.equal(value, truth), offset


@every_operator
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-20, 1e20])
def test_extreme_images_have_the_gradients_of_the_reference(name, scale):
    inputs = [image * scale for image in images(name, (1, 2, 4, 6), torch.float32)]
    for value, truth in zip(*(results(getattr(of, name), inputs) for of in (ops, reference)), strict=True):
        assert torch.isfinite(value).all()
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))


@every_operator
def test_opcheck_finds_nothing(name):
    operator = getattr(torch.ops.mitnet_fast, name).default
    for shape in ((2, 3, 5, 6), (4, 3)):
        torch.library.opcheck(operator, [image.requires_grad_() for image in images(name, shape)])
    channels_last = [i.contiguous(memory_format=torch.channels_last) for i in images(name, (2, 3, 5, 6))]
    torch.library.opcheck(operator, [image.requires_grad_() for image in channels_last])


@every_operator
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_compiles_as_one_graph_with_its_backward(name, backend):
    def step(*inputs):
        outputs = getattr(ops, name)(*(2 * image for image in inputs))
        return tuple(3 * output for output in outputs) if isinstance(outputs, tuple) else 3 * outputs

    torch.compiler.reset()
    inputs = images(name, (1, 2, 4, 6), torch.float32)
    compiled = results(torch.compile(step, fullgraph=True, backend=backend), inputs)
    torch.compiler.reset()
    for value, truth in zip(compiled, results(step, inputs), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-4)


@every_operator
def test_second_derivatives_are_a_clear_error(name):
    inputs = [image.requires_grad_() for image in images(name, (1, 1, 4, 5))]
    outputs = getattr(ops, name)(*inputs)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    (grad,) = torch.autograd.grad(first.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=rf"{name} has no second derivative; use mitnet_fast\.reference\.{name}"):
        grad.sum().backward()


@every_operator
def test_function_transforms_go_through_the_reference(name):
    inputs = images(name, (2, 4, 5))

    def total(*arguments):
        outputs = getattr(ops, name)(*arguments)
        return outputs[0].sum() if isinstance(outputs, tuple) else outputs.sum()

    leaves = [image.clone().requires_grad_() for image in inputs]
    (expected, *_) = torch.autograd.grad(total(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(total)(*inputs), expected, rtol=1e-12, atol=1e-12)
    each = torch.stack([total(*(image[n] for image in inputs)) for n in range(2)])
    torch.testing.assert_close(torch.func.vmap(total)(*inputs), each, rtol=1e-12, atol=1e-12)


def training_step(network, image):
    out = network(image)
    spectrum = ops.half_spectrum(out.restored - image).abs().mean()
    return out.restored.square().mean() + out.stage1.abs().mean() + out.stage1_amplitude.mean() + spectrum


def step_compiled_and_not(backend):
    torch.manual_seed(0)
    network = MITNet(width=4, decoder_spectral=True)
    image = torch.rand(1, 3, 32, 32)
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        network.zero_grad()
        step = torch.compile(training_step, fullgraph=True, backend=backend) if compiled else training_step
        loss = step(network, image)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    torch.compiler.reset()
    return found


def test_a_training_step_of_mitnet_is_one_graph():
    plain, compiled = step_compiled_and_not("aot_eager")
    for value, truth in zip(compiled, plain, strict=True):
        torch.testing.assert_close(value, truth)


@pytest.mark.exhaustive
def test_inductor_compiles_a_training_step_of_mitnet_as_one_graph():
    plain, compiled = step_compiled_and_not("inductor")
    torch.testing.assert_close(compiled[0], plain[0])
    distance = sum(float((value - truth).square().sum()) for value, truth in zip(compiled[1:], plain[1:], strict=True))
    norm = sum(float(truth.square().sum()) for truth in plain[1:])
    assert distance**0.5 <= 1e-3 * norm**0.5
