"""Public feature mixing, parts of DCMPNet and MITNet that are one operator each: arguments checked, backend chosen.

The compiled backend runs behind ``mitnet_fast::pointwise_mlp``, ``local_mixing``, ``local_global_mixing``,
``normalized_qkv``, ``dense_block``, ``conv_relu``, ``residual_conv`` and their backward operators; the reference is
plain PyTorch and needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from .. import reference
from .._extension import EXTENSION
from ..reference.feature_mixing import DENSE_LAYERS
from ._backends import Kernels, check_backend, choose, convolution_tf32, triton_kernels
from ._checks import (
    cast_like_convolution,
    check_image_size,
    check_one_device,
    check_one_dtype,
    check_shape,
    check_tensor,
)
from ._registration import define, differentiate, empty_for, in_layout_of, or_empty

ON_CPU = {("cpp", "cpu"): frozenset({torch.float32, torch.float64, torch.bfloat16})}
IN_TRITON = dict.fromkeys(
    (("triton", "cuda"), ("triton", "cpu")), frozenset({torch.float32, torch.bfloat16, torch.float16})
)
PIXELS = {"pixels per image": 2**30}
# all channels of a tile of pixels share one program's registers
PIXELS_AND_CHANNELS = PIXELS | {"channels": 128}
PARTS_OF_LEGM = Kernels("feature_mixing", ON_CPU | IN_TRITON, dict.fromkeys(IN_TRITON, PIXELS_AND_CHANNELS))
CONVOLUTIONS = Kernels("feature_mixing", ON_CPU | IN_TRITON, dict.fromkeys(IN_TRITON, PIXELS))
KERNELS = {
    "pointwise_mlp": PARTS_OF_LEGM,
    "local_mixing": PARTS_OF_LEGM,
    "local_global_mixing": PARTS_OF_LEGM,
    "normalized_qkv": PARTS_OF_LEGM,
    "dense_block": CONVOLUTIONS,
    "conv_relu": CONVOLUTIONS,
    "residual_conv": CONVOLUTIONS,
}
LOCAL_SIZE = 5  # of the depthwise convolution, pixels
SMALLEST_SIDE = 3  # that reflection can continue by two pixels
MEANINGS = {  # shapes of what is mixed
    "value": "[B, C, H, W]",
    "attended": "[B, C, H, W]",
    "value_weight": "[C, C]",
    "value_bias": "[C]",
    "local_weight": "[C, 5, 5]",
    "local_bias": "[C]",
    "proj_weight": "[C, C]",
    "proj_bias": "[C]",
    "rescale": "[B, C]",
    "rebias": "[B, C]",
}


def pointwise_mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Residual network of two 1×1 convolutions with a ReLU between them, ``x + W2·ReLU(W1·x + b1) + b2``.

    Args:
        x: [B, C, H, W].
        weight1: [Ch, C], dtype of ``x``.
        bias1: [Ch].
        weight2: [C, Ch].
        bias2: [C].
        backend: see :mod:`mitnet_fast.ops`.

    Returns:
        [B, C, H, W] in the dtype of the inputs (under autocast: the dtype that it casts to).

    Raises:
        TypeError: an argument is no tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not fit, or the backend does not exist.
        BackendError: the backend asked for cannot run this call.

    Source: DCMPNet (arXiv 2403.01105), local feature-embedded global extraction.
    """
    check_tensor("x", x, "[B, C, H, W]")
    check_tensor("weight1", weight1, "[Ch, C]")
    check_image_size("x", x)
    channels, hidden = x.shape[1], weight1.shape[0]
    if hidden < 1:
        raise ValueError("weight1: needs at least one hidden channel, got 0")
    arguments = {"x": x, "weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    shapes = {"weight1": (hidden, channels), "bias1": (hidden,), "weight2": (channels, hidden), "bias2": (channels,)}
    meanings = {"weight1": "[Ch, C]", "bias1": "[Ch]", "weight2": "[C, Ch]", "bias2": "[C]"}
    return _call("pointwise_mlp", arguments, shapes, meanings, backend)


def local_mixing(
    x: torch.Tensor,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor,
    local_weight: torch.Tensor,
    local_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Residual mixing of neighbours, ``x + P·depthwise5×5(V·x)``, the map continued by reflection.

    Args:
        x: [B, C, H, W], at least 3×3 pixels.
        value_weight: [C, C] of the 1×1 convolution V, dtype of ``x``.
        value_bias: [C].
        local_weight: [C, 5, 5] of the depthwise convolution.
        local_bias: [C].
        proj_weight: [C, C] of the 1×1 convolution P.
        proj_bias: [C].
        backend: see :mod:`mitnet_fast.ops`.

    Returns:
        [B, C, H, W] in the dtype of the inputs (under autocast: the dtype that it casts to).

    Raises:
        TypeError: an argument is no tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not fit, the map is too small, or the backend does not exist.
        BackendError: the backend asked for cannot run this call.

    Source: DCMPNet (arXiv 2403.01105), local feature-embedded global extraction without attention.
    """
    arguments = {
        "x": x,
        "value_weight": value_weight,
        "value_bias": value_bias,
        "local_weight": local_weight,
        "local_bias": local_bias,
        "proj_weight": proj_weight,
        "proj_bias": proj_bias,
    }
    return _mix("local_mixing", arguments, backend)


def local_global_mixing(
    x: torch.Tensor,
    value: torch.Tensor,
    attended: torch.Tensor,
    local_weight: torch.Tensor,
    local_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    rescale: torch.Tensor,
    rebias: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Residual mixing of neighbours and attention, ``x + rescale·P·(depthwise5×5(value) + attended) + rebias``.

    The convolution continues its map by reflection; P has its bias inside the product with ``rescale``.

    Args:
        x: [B, C, H, W], at least 3×3 pixels.
        value: [B, C, H, W], dtype of ``x``.
        attended: [B, C, H, W], attention over the values.
        local_weight: [C, 5, 5] of the depthwise convolution.
        local_bias: [C].
        proj_weight: [C, C] of the 1×1 convolution P.
        proj_bias: [C].
        rescale: [B, C].
        rebias: [B, C].
        backend: see :mod:`mitnet_fast.ops`.

    Returns:
        [B, C, H, W] in the dtype of the inputs (under autocast: the dtype that it casts to).

    Raises:
        TypeError: an argument is no tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not fit, the map is too small, or the backend does not exist.
        BackendError: the backend asked for cannot run this call.

    Source: DCMPNet (arXiv 2403.01105), local feature-embedded global extraction.
    """
    arguments = {
        "x": x,
        "value": value,
        "attended": attended,
        "local_weight": local_weight,
        "local_bias": local_bias,
        "proj_weight": proj_weight,
        "proj_bias": proj_bias,
        "rescale": rescale,
        "rebias": rebias,
    }
    return _mix("local_global_mixing", arguments, backend)


def normalized_qkv(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor,
    query_key_weight: torch.Tensor,
    query_key_bias: torch.Tensor,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise each sample over channels and pixels, then project every pixel to value, query and key.

    ``n = γ·(x − μ)/σ + β`` with the mean μ and the deviation σ = √(variance + 1e-5) of each sample.

    Args:
        x: [B, C, H, W].
        norm_weight: [C], γ, dtype of ``x``.
        norm_bias: [C], β.
        value_weight: [C, C] of the 1×1 convolution to values.
        value_bias: [C].
        query_key_weight: [2C, C] of the 1×1 convolution to queries and keys.
        query_key_bias: [2C].
        backend: see :mod:`mitnet_fast.ops`.

    Returns:
        value [B, C, H, W], query and key [B, 2C, H, W], μ [B] and σ [B], in the dtype of the inputs (under
        autocast: the dtype that it casts to).

    Raises:
        TypeError: an argument is no tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not fit, or the backend does not exist.
        BackendError: the backend asked for cannot run this call.

    Source: DCMPNet (arXiv 2403.01105), local feature-embedded global extraction; DehazeFormer (arXiv 2204.03883).
    """
    check_tensor("x", x, "[B, C, H, W]")
    check_image_size("x", x)
    channels = x.shape[1]
    arguments = {
        "x": x,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "value_weight": value_weight,
        "value_bias": value_bias,
        "query_key_weight": query_key_weight,
        "query_key_bias": query_key_bias,
    }
    shapes = {
        "norm_weight": (channels,),
        "norm_bias": (channels,),
        "value_weight": (channels, channels),
        "value_bias": (channels,),
        "query_key_weight": (2 * channels, channels),
        "query_key_bias": (2 * channels,),
    }
    meanings = {"norm_weight": "[C]", "norm_bias": "[C]", "value_weight": "[C, C]", "value_bias": "[C]"}
    meanings |= {"query_key_weight": "[2C, C]", "query_key_bias": "[2C]"}
    return _call("normalized_qkv", arguments, shapes, meanings, backend)


def dense_block(
    x: torch.Tensor,
    dense_weight: torch.Tensor,
    dense_bias: torch.Tensor,
    fuse_weight: torch.Tensor,
    fuse_bias: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Dilated residual dense block: five 3×3 convolutions of dilation 2, each of all channels before it.

    ``f_k = [f_{k−1}, ReLU(conv(f_{k−1}))]`` from ``f_0 = x``, ``ReLU(P·f_5) + x``; zeros around the map.

    Args:
        x: [B, C, H, W].
        dense_weight: [45·G·(C + 2·G)], the weights [G, C + k·G, 3, 3] of the layers k = 0 … 4 flattened, one
            after the other, dtype of ``x``.
        dense_bias: [5·G].
        fuse_weight: [C, C + 5·G] of the 1×1 convolution P.
        fuse_bias: [C].
        backend: see :mod:`mitnet_fast.ops`.

    Returns:
        [B, C, H, W] in the dtype of the inputs (under autocast: the dtype that it casts to).

    Raises:
        TypeError: an argument is no tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not fit, or the backend does not exist.
        BackendError: the backend asked for cannot run this call.

    Source: DCMPNet (arXiv 2403.01105), depth estimation network.
    """
    check_tensor("x", x, "[B, C, H, W]")
    check_tensor("dense_bias", dense_bias, "[5·G]")
    check_image_size("x", x)
    channels, growth = x.shape[1], dense_bias.shape[0] // DENSE_LAYERS
    if growth < 1:
        raise ValueError(f"dense_bias: needs at least one channel for each of 5 layers, got {list(dense_bias.shape)}")
    arguments = {"x": x, "dense_weight": dense_weight, "dense_bias": dense_bias}
    arguments |= {"fuse_weight": fuse_weight, "fuse_bias": fuse_bias}
    shapes = {
        "dense_weight": (45 * growth * (channels + 2 * growth),),
        "dense_bias": (DENSE_LAYERS * growth,),
        "fuse_weight": (channels, channels + DENSE_LAYERS * growth),
        "fuse_bias": (channels,),
    }
    meanings = {"dense_weight": "[45·G·(C + 2·G)]", "dense_bias": "[5·G]", "fuse_weight": "[C, C + 5·G]"}
    return _call("dense_block", arguments, shapes, meanings | {"fuse_bias": "[C]"}, backend)


def conv_relu(
    x: torch.Tensor,
    joined: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """3×3 convolution of one map or of two, ``ReLU(scale·conv3×3([x, joined]) + shift)``, zeros around the map.

    With a batch normalisation's statistics in ``scale`` and ``shift`` this is convolution, normalisation and ReLU of
    a network that is no longer trained. The backward operator is the library's convolution, and keeps the result.

    Args:
        x: [B, C1, H, W].
        joined: [B, C2, H, W], dtype of ``x``; None for the convolution of ``x`` alone.
        weight: [Co, C1 + C2, 3, 3].
        scale: [Co].
        shift: [Co].
        backend: see :mod:`mitnet_fast.ops`.

    Returns:
        [B, Co, H, W] in the dtype of the inputs (under autocast: the dtype that it casts to).

    Raises:
        TypeError: an argument is no tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not fit, or the backend does not exist.
        BackendError: the backend asked for cannot run this call.

    Source: minimal filtering F(2×2, 3×3), arXiv 1509.09308.
    """
    channels, out, shapes = _check_joined(x, joined, "weight", weight)
    shapes |= {"weight": (out, channels, 3, 3), "scale": (out,), "shift": (out,)}
    arguments = {"x": x, "joined": joined, "weight": weight, "scale": scale, "shift": shift}
    meanings = {"joined": "[B, C2, H, W]", "weight": "[Co, C1 + C2, 3, 3]", "scale": "[Co]", "shift": "[Co]"}
    return _call("conv_relu", arguments, shapes, meanings, backend)


def residual_conv(
    x: torch.Tensor,
    joined: torch.Tensor | None,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    identity_weight: torch.Tensor,
    identity_bias: torch.Tensor,
    *,
    identity_scale: float = 1.0,
    negative_slope: float = 0.2,
    backend: str | None = None,
) -> torch.Tensor:
    """Two 3×3 convolutions of one map or of two, a LeakyReLU after each, and a 1×1 convolution as their shortcut.

    With m = [x, joined] the result is ``LeakyReLU(W2*LeakyReLU(W1*m + b1) + b2) + identity_scale·(Wi·m + bi)``, zeros
    around the maps. The compiled operator keeps its result for the backward and, in single and double precision, the
    map between the convolutions. On a CPU the second LeakyReLU's gradient follows there from the result: where the
    shortcut is so large that rounding loses the convolutions beside it, it is the slope. In half precision and in
    Triton the second convolution is computed again.

    Args:
        x: [B, C1, H, W].
        joined: [B, C2, H, W], dtype of ``x``; None for the convolutions of ``x`` alone.
        weight1: [Co, C1 + C2, 3, 3] of the first convolution, W1.
        bias1: [Co].
        weight2: [Co, Co, 3, 3] of the second convolution, W2.
        bias2: [Co].
        identity_weight: [Co, C1 + C2] of the 1×1 convolution, Wi.
        identity_bias: [Co].
        identity_scale: how often the shortcut counts.
        negative_slope: of both LeakyReLUs, in [0, 1).
        backend: see :mod:`mitnet_fast.ops`.

    Returns:
        [B, Co, H, W] in the dtype of the inputs (under autocast: the dtype that it casts to).

    Raises:
        TypeError: an argument is no tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not fit, the slope is outside [0, 1), or the backend does not exist.
        BackendError: the backend asked for cannot run this call.

    Source: MITNet (arXiv 2308.06998), residual amplitude / phase block; minimal filtering, arXiv 1509.09308.
    """
    channels, out, shapes = _check_joined(x, joined, "weight1", weight1)
    if not 0 <= negative_slope < 1:
        raise ValueError(f"negative_slope: expected a number in [0, 1), got {negative_slope!r}")
    arguments = {"x": x, "joined": joined, "weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    arguments |= {"identity_weight": identity_weight, "identity_bias": identity_bias}
    shapes |= {"weight1": (out, channels, 3, 3), "bias1": (out,), "weight2": (out, out, 3, 3), "bias2": (out,)}
    shapes |= {"identity_weight": (out, channels), "identity_bias": (out,)}
    meanings = {"joined": "[B, C2, H, W]", "weight1": "[Co, C1 + C2, 3, 3]", "weight2": "[Co, Co, 3, 3]"}
    meanings |= {"identity_weight": "[Co, C1 + C2]"} | dict.fromkeys(("bias1", "bias2", "identity_bias"), "[Co]")
    options = {"identity_scale": float(identity_scale), "negative_slope": float(negative_slope)}
    return _call("residual_conv", arguments, shapes, meanings, backend, options)


def _check_joined(
    x: torch.Tensor, joined: torch.Tensor | None, name: str, weight: torch.Tensor
) -> tuple[int, int, dict[str, tuple[int, ...]]]:
    """Channels of both maps and of the result of a 3×3 convolution, and the shape that a joined map must have."""
    check_tensor("x", x, "[B, C1, H, W]")
    check_image_size("x", x)
    check_tensor(name, weight, "[Co, C1 + C2, 3, 3]")
    batch, channels, height, width = x.shape
    if weight.shape[0] < 1:
        raise ValueError(f"{name}: needs at least one output channel, got 0")
    if joined is None:
        return channels, weight.shape[0], {}
    check_tensor("joined", joined, "[B, C2, H, W]")
    check_image_size("joined", joined)
    shapes = {"joined": (batch, joined.shape[1], height, width)}
    return channels + joined.shape[1], weight.shape[0], shapes


def _mix(name: str, arguments: dict[str, torch.Tensor], backend: str | None) -> torch.Tensor:
    """Both forms of mixing: all shapes follow from that of x."""
    x = arguments["x"]
    check_tensor("x", x, "[B, C, H, W]")
    check_image_size("x", x)
    batch, channels, height, width = x.shape
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(
            f"x: needs at least {SMALLEST_SIDE}×{SMALLEST_SIDE} pixels to be continued by two, got {height}×{width}"
        )
    sizes = {
        "[B, C, H, W]": (batch, channels, height, width),
        "[C, C]": (channels, channels),
        "[C, 5, 5]": (channels, LOCAL_SIZE, LOCAL_SIZE),
        "[C]": (channels,),
        "[B, C]": (batch, channels),
    }
    shapes = {argument: sizes[MEANINGS[argument]] for argument in arguments if argument != "x"}
    return _call(name, arguments, shapes, MEANINGS, backend)


def _call(
    name: str,
    arguments: dict[str, torch.Tensor | None],
    shapes: dict[str, tuple[int, ...]],
    meanings: dict[str, str],
    backend: str | None,
    options: Mapping[str, float] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Check the arguments against their shapes, cast them, choose the backend and run, with ``options`` behind them."""
    check_backend(backend)
    options = options or {}
    for argument, shape in shapes.items():
        check_tensor(argument, arguments[argument], meanings[argument])
        check_shape(argument, arguments[argument], shape, meanings[argument])
    check_one_device(**arguments)
    tensors = cast_like_convolution(*arguments.values())
    check_one_dtype(**dict(zip(arguments, tensors, strict=True)))
    x = tensors[0]
    sizes = {"channels": x.shape[1], "pixels per image": x.shape[2] * x.shape[3]}
    chosen = choose(KERNELS[name], backend, x.device.type, x.dtype, sizes)
    if chosen == "reference":
        return getattr(reference, name)(*tensors, **options)
    operator = getattr(torch.ops.mitnet_fast, name)
    if name not in _KEEPING:
        return operator(*tensors, *options.values(), chosen)
    has_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    # half precision would round it, where kernels on a CPU do not
    keeps = has_gradient and x.dtype in (torch.float32, torch.float64)
    return operator(*tensors, *options.values(), keeps, chosen)[0]


_KEEPING: set[str] = set()  # operators that are told whether to keep something for their backward
LIKE_THE_FIRST = MappingProxyType({"": lambda first, *_: empty_for(first)})


def _register(
    name: str,
    tensors: tuple[str, ...],
    *,
    optional: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
    only_added: str | None = None,
    results: Mapping[str, Callable[..., torch.Tensor]] = LIKE_THE_FIRST,
    run_backward: Callable[..., Sequence[torch.Tensor | None]] | None = None,
    keeps_result: bool = False,
    kept: Callable[..., torch.Tensor] | None = None,
    in_triton: str = "feature_mixing",
) -> None:
    """Register an operator of these tensors, some ``optional``, and of numbers, its ``options``, and its backward.

    The gradient of the tensor that is ``only_added`` is the incoming one: the kernels leave it out. The ``results``,
    one or several by name, are like what their functions make of the tensors. ``run_backward`` stands in for the
    compiled backward: of the incoming gradients, the result where the operator ``keeps_result``, the tensors and which
    gradients are needed. An operator with something else to be ``kept``, like what this function makes of the tensors,
    is told whether to, and returns it behind its result, or no elements. ``in_triton`` is the module of its Triton
    launchers, which are told last whether their products may use TF32.
    """
    count, flags = len(tensors), 1 if kept else 0
    if kept:
        _KEEPING.add(name)

    def launch(direction, backend, *values):
        if backend == "cpp":
            return getattr(EXTENSION, f"{name}_{direction}")(*values)
        return getattr(triton_kernels(in_triton), f"{name}_{direction}")(*values, convolution_tf32(values[0]))

    def forward(*arguments):
        *values, backend = arguments
        made = launch("forward", backend, *values)
        return (*made[:-1], or_empty(made[-1], values[0])) if kept else made

    def fake(*arguments):
        *values, _ = arguments
        made = tuple(make(*values) for make in results.values())
        if kept:
            made += (kept(*values) if values[-1] else values[0].new_empty(0),)
        return made if len(made) > 1 else made[0]

    def backward(*arguments):
        *values, needs, backend = arguments
        grads = run_backward(*values, needs) if run_backward else launch("backward", backend, *values, needs)
        # weights may be in channels_last; kernels write their gradients contiguously
        return tuple(
            values[0].new_empty(0) if gradient is None else in_layout_of(tensor, gradient)
            for gradient, tensor in zip(grads, inputs_of(values), strict=True)
        )

    def setup(ctx, inputs, output):
        ctx.options, ctx.backend = inputs[count : count + len(options)], inputs[-1]
        ctx.set_materialize_grads(not kept)  # nobody asks for that of what is kept
        ctx.save_for_backward(*(output if kept else [output] if keeps_result else []), *inputs[:count])

    def gradients(ctx, *incoming):
        incoming = incoming[: len(results)]
        if kept and incoming[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = ctx.needs_input_grad[:count]
        computed = [needed and tensor != only_added for tensor, needed in zip(tensors, needs, strict=True)]
        grads = getattr(torch.ops.mitnet_fast, f"{name}_backward")(
            *incoming, *ctx.saved_tensors, *ctx.options, computed, ctx.backend
        )
        wanted = (
            None if not needed else incoming[0] if tensor == only_added else gradient
            for tensor, gradient, needed in zip(tensors, grads, needs, strict=True)
        )
        return *wanted, *[None] * (len(options) + flags + 1)

    def fake_gradients(*arguments):
        *values, needs, _ = arguments
        inputs = inputs_of(values)
        return tuple(
            empty_for(inputs[0] if tensor is None else tensor, needed)
            for tensor, needed in zip(inputs, needs, strict=True)
        )

    def inputs_of(values):
        """The tensors among what a backward is given."""
        return values[len(values) - len(options) - count :][:count]

    def several(number):
        return f"({', '.join(['Tensor'] * number)})" if number > 1 else "Tensor"

    declared = ", ".join(
        [*(f"Tensor{'?' * (tensor in optional)} {tensor}" for tensor in tensors), *(f"float {o}" for o in options)]
    )
    grads = ", ".join(f"Tensor {'_'.join(filter(None, ('grad', result)))}" for result in results)
    grads += ", Tensor result" * keeps_result + ", Tensor kept" * flags
    define(f"{name}({declared}{', bool keeps' * flags}, str backend) -> {several(len(results) + flags)}", forward, fake)
    define(
        f"{name}_backward({grads}, {declared}, bool[] needs, str backend) -> {several(count)}",
        backward,
        fake_gradients,
    )
    differentiate(name, setup, gradients)


_register("pointwise_mlp", ("x", "weight1", "bias1", "weight2", "bias2"))
_WEIGHTS = ("local_weight", "local_bias", "proj_weight", "proj_bias")
_register("local_mixing", ("x", "value_weight", "value_bias", *_WEIGHTS))
_register("local_global_mixing", ("x", "value", "attended", *_WEIGHTS, "rescale", "rebias"), only_added="x")
_register(
    "normalized_qkv",
    (
        *("x", "norm_weight", "norm_bias", "value_weight", "value_bias"),
        *("query_key_weight", "query_key_bias"),
    ),
    results={
        "value": lambda x, *_: empty_for(x),
        "query_key": lambda x, *_: empty_for(x, channels=2 * x.shape[1]),
        "mean": lambda x, *_: x.new_empty(x.shape[0]),
        "deviation": lambda x, *_: x.new_empty(x.shape[0]),
    },
)
_register("dense_block", ("x", "dense_weight", "dense_bias", "fuse_weight", "fuse_bias"), in_triton="convolution")


def _conv_relu_backward(grad, y, x, joined, weight, scale, shift, needs):
    """By the library's convolution; what ReLU has let through is seen in its result."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    maps = (x if joined is None else torch.cat([x, joined], 1)).to(wide)
    kernel, factor = weight.to(wide), scale.to(wide)[:, None, None, None]
    grad = torch.ops.aten.threshold_backward(grad, y, 0).to(wide)
    wanted = (needs[0] or needs[1], needs[2] or needs[3], needs[4])
    unit = [1, 1]
    # the scale goes into the kernel: what comes out for that is the gradient of an unscaled one
    grad_maps, grad_kernel, grad_shift = torch.ops.aten.convolution_backward(
        grad, maps, kernel * factor, [len(shift)], unit, unit, unit, False, [0, 0], 1, wanted
    )
    grad_x, grad_joined = (
        (None, None) if grad_maps is None else grad_maps.split((x.shape[1], maps.shape[1] - x.shape[1]), 1)
    )
    grad_weight, grad_scale = (
        (None, None) if grad_kernel is None else (grad_kernel * factor, (grad_kernel * kernel).sum((1, 2, 3)))
    )
    return tuple(
        empty_for(tensor).copy_(gradient) if needed else None
        for tensor, gradient, needed in zip(
            (x, joined, weight, scale, shift),
            (grad_x, grad_joined, grad_weight, grad_scale, grad_shift),
            needs,
            strict=True,
        )
    )


_register(
    "conv_relu",
    ("x", "joined", "weight", "scale", "shift"),
    optional=("joined",),
    results={"": lambda x, joined, weight, *_: empty_for(x, channels=weight.shape[0])},
    run_backward=_conv_relu_backward,
    keeps_result=True,
    in_triton="convolution",
)
_register(
    "residual_conv",
    ("x", "joined", "weight1", "bias1", "weight2", "bias2", "identity_weight", "identity_bias"),
    optional=("joined",),
    options=("identity_scale", "negative_slope"),
    results={"": lambda x, joined, weight1, *_: empty_for(x, channels=weight1.shape[0])},
    keeps_result=True,
    kept=lambda x, joined, weight1, *_: empty_for(x, channels=weight1.shape[0]),
    in_triton="convolution",
)
