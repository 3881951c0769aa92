"""Configuration of a training run: one typed schema for presets, YAML files and overrides.

A configuration is a mapping of sections (``network``, ``loss``, ``data``, ``optimizer``,
``schedule``, ``run``, ``validation``, ``output``) with the values of a preset below them; a YAML file has
the same layout and may state only what differs from the preset it names. Overrides are strings
``section.field=value`` with a YAML value. Unknown fields are errors, never ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class ConfigError(ValueError):
    """A configuration that cannot be used; the message has one line per field at fault."""


Stages = tuple[int, int, int, int, int]
LocalPath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


class Section(BaseModel):
    """Base of all sections: unknown fields forbidden, infinities and NaN refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)


class MITNetNetwork(Section):
    """Arguments of :class:`~mitnet_fast.models.MITNet`."""

    width: int = Field(20, ge=1, description="channels at full size")
    depth: int = Field(4, ge=2, description="levels of either U-Net")
    decoder_spectral: bool = Field(False, description="spectral branch in the decoder of stage 1, as in the paper")


class DCMPNetNetwork(Section):
    """Arguments of :class:`~mitnet_fast.models.DCMPNet`; the depth network has those of its depth branch."""

    widths: tuple[int, int, int] = Field((24, 48, 96), description="channels at full, half and quarter size")
    depths: Stages = Field((8, 8, 8, 4, 4), description="blocks of the five stages")
    heads: Stages = Field((2, 4, 6, 1, 1), description="attention heads of the stages")
    mlp_ratios: tuple[float, float, float, float, float] = Field(
        (2, 4, 4, 2, 2), description="hidden channels of the stages' pointwise networks, in multiples"
    )
    attention_ratios: tuple[float, float, float, float, float] = Field(
        (1 / 4, 1 / 2, 3 / 4, 0, 0), description="share of each stage's blocks with attention"
    )
    window_size: int = Field(8, ge=2, description="of the attention, pixels")
    prior_widths: Stages = Field((64, 128, 256, 512, 512), description="channels of the U-Net prior")
    depth_widths: tuple[int, ...] = Field((24, 48, 96, 128), description="channels of the depth networks")
    growth: int = Field(32, ge=1, description="channels added by each dense convolution of the depth networks")
    share_depth: bool = Field(False, description="take the depth network's map instead of a depth branch's")


class MITNetLossWeights(Section):
    """Terms of :class:`~mitnet_fast.losses.MITNetLoss`."""

    spectral_weight: float = Field(0.05, ge=0, description="of the two spectral L1 terms")
    mutual_information: Literal["scalable", "official"] = Field(
        "scalable", description="trained, at any patch size; or frozen as released, patch 256 only"
    )
    mutual_information_weight: float = Field(0.001, ge=0, description="of the regulariser; 0 leaves it out")
    ssim_weight: float = Field(0.0, ge=0, description="of 1 − SSIM of both stages, 1 for Dense-Haze and NH-HAZE")


class DCMPNetLossWeights(Section):
    """Terms of :class:`~mitnet_fast.losses.DCMPNetLoss`."""

    mode: Literal["difference_perception", "official"] = Field(
        "difference_perception", description="the paper's alternation of the two tasks, or the release's summed losses"
    )
    depth_weight: float = Field(0.1, ge=0, description="of the depth term in the dehazing loss")
    contrastive_weight: float = Field(1.0, ge=0, description="of the contrastive term; 0 needs no VGG-19 weights")
    vgg_weights: LocalPath | None = Field(None, description="VGG-19 weights file; null: torch.hub's, fetched once")


class Data(Section):
    """What is trained on."""

    root: LocalPath | None = Field(None, description="folder of the training set")
    layout: str | None = Field(None, description="name of the folder layout; null: recognised")
    validation_root: LocalPath | None = Field(None, description="folder to validate on; null: the test split of root")
    patch: int = Field(256, ge=8, description="side of the square training patches, pixels")
    batch: int = Field(8, ge=1, description="patches per optimizer step")
    drop_last: bool = Field(True, description="leave out of an epoch what does not fill a last batch")
    repeat: int = Field(1, ge=1, description="how often an epoch visits each image")
    augment: Literal["mitnet", "dcmpnet", "none"] = Field("mitnet", description="the release's crops, flips, rotations")
    workers: int = Field(4, ge=0, description="processes that decode and cut windows; 0: the training process itself")


class DCMPNetData(Data):
    """What is trained on, and the depth of the clear images."""

    augment: Literal["mitnet", "dcmpnet", "none"] = Field(
        "dcmpnet", description="the release's crops, flips, rotations"
    )
    depth: str | None = Field(None, description="folder of depth maps, or 'none' to train without the depth terms")

    @field_validator("depth")
    @classmethod
    def _absolute(cls, depth: str | None) -> str | None:
        return depth if depth in (None, "none") else str(Path(depth).expanduser().absolute())


class Optimizer(Section):
    """Adam and what happens to the gradients before it."""

    lr: float = Field(2e-4, gt=0, description="initial learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="decay of Adam's first and second moment"
    )
    clip: float | None = Field(None, gt=0, description="largest norm of all gradients of an optimizer; null: no limit")
    accumulate: int = Field(1, ge=1, description="parts that a batch is cut into, to save memory")


class Schedule(Section):
    """Learning rate over the epochs."""

    kind: Literal["halve", "cosine", "constant"] = Field("halve", description="form of the decay, a step per epoch")
    halve_every: int = Field(200, ge=1, description="epochs between two halvings (kind halve)")
    cosine_minimum: float = Field(1e-6, ge=0, description="learning rate after the last epoch (kind cosine)")


class Run(Section):
    """Length, device and arithmetic."""

    epochs: int = Field(1000, ge=1, description="epochs in all")
    steps_per_epoch: int | None = Field(None, ge=1, description="steps of an epoch; null: every sample once")
    seed: int = Field(0, ge=0, lt=2**63, description="of initial weights, order, augmentation and noise")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: CUDA where there is a GPU")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast, weights in float32")
    channels_last: bool = Field(
        True, description="memory format of images and weights; false: NCHW, slower wherever it was measured"
    )
    compile: Literal["inductor", "aot_eager", "eager"] | None = Field(
        None, description="torch.compile backend for the dehazing network; null: not compiled"
    )
    step: Literal["eager", "cuda_graph", "compile"] = Field(
        "eager",
        description="how a step runs: call by call; as one recorded CUDA graph; or call by call with networks and "
        "losses compiled together (run.compile, or inductor). Where that is impossible, call by call, saying why",
    )
    ema: float | None = Field(None, gt=0, lt=1, description="decay of averaged weights; null: none")
    weights: LocalPath | None = Field(None, description="file of weights to start from; null: random weights")
    max_nonfinite: int = Field(20, ge=1, description="skipped non-finite steps in a row that end the run")


class Validation(Section):
    """Scoring of whole images during training."""

    every: int = Field(1, ge=0, description="epochs between validations; 0: never")
    images: int | None = Field(None, ge=1, description="images to score; null: all")
    protocol: str = Field("full-rgb", description="protocol of mitnet_fast.evaluation")


class Output(Section):
    """What is written, and how often."""

    log_every: int = Field(10, ge=1, description="steps per row of log.csv")
    tensorboard: bool = Field(False, description="write curves for TensorBoard too (needs the package tensorboard)")
    checkpoint_every: int = Field(500, ge=1, description="steps between writings of last.pt within an epoch")
    keep_every: int | None = Field(None, ge=1, description="epochs between checkpoints kept for good; null: none")


class Configuration(Section):
    """A whole run; subclasses add the sections that depend on the system."""

    system: str
    preset: str | None = Field(None, description="the preset that this started from")
    data: Data
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    run: Run = Run()
    validation: Validation = Validation()
    output: Output = Output()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.data.batch % self.optimizer.accumulate:
            raise ValueError(
                f"optimizer.accumulate: got {self.optimizer.accumulate}, which does not divide "
                f"data.batch = {self.data.batch}"
            )
        if self.schedule.kind == "cosine" and self.schedule.cosine_minimum > self.optimizer.lr:
            raise ValueError(
                f"schedule.cosine_minimum: got {self.schedule.cosine_minimum:g}, above optimizer.lr = "
                f"{self.optimizer.lr:g}"
            )
        return self


class MITNetConfiguration(Configuration):
    """Training of MITNet."""

    system: Literal["mitnet"] = "mitnet"
    network: MITNetNetwork = MITNetNetwork()
    loss: MITNetLossWeights = MITNetLossWeights()
    data: Data = Data()

    @model_validator(mode="after")
    def _patch_fits(self) -> Self:
        multiple = 2 ** (self.network.depth - 1)
        if self.data.patch % multiple:
            raise ValueError(
                f"data.patch: got {self.data.patch}, allowed are multiples of {multiple} (network.depth = "
                f"{self.network.depth})"
            )
        official = self.loss.mutual_information == "official" and self.loss.mutual_information_weight > 0
        if official and (self.data.patch != 256 or self.network.depth != 4):
            raise ValueError(
                f"loss.mutual_information: official is made for data.patch = 256 and network.depth = 4, got "
                f"{self.data.patch} and {self.network.depth}; scalable takes any"
            )
        return self


class DCMPNetConfiguration(Configuration):
    """Training of DCMPNet and its depth network."""

    system: Literal["dcmpnet"] = "dcmpnet"
    network: DCMPNetNetwork = DCMPNetNetwork()
    loss: DCMPNetLossWeights = DCMPNetLossWeights()
    data: DCMPNetData = DCMPNetData()

    @model_validator(mode="after")
    def _depth_where_shared(self) -> Self:
        if self.network.share_depth and self.data.depth == "none":
            raise ValueError("network.share_depth: needs a trained depth network, but data.depth is none")
        return self


SYSTEMS: dict[str, type[Configuration]] = {"mitnet": MITNetConfiguration, "dcmpnet": DCMPNetConfiguration}

_MITNET_REAL = {
    "system": "mitnet",
    "loss": {"ssim_weight": 1.0},
    "data": {"batch": 4, "repeat": 100},
    "schedule": {"halve_every": 100},
    "validation": {"every": 5, "protocol": "mitnet-crop16"},
}
_DCMPNET = {
    "system": "dcmpnet",
    "optimizer": {"lr": 1e-4},
    "schedule": {"kind": "cosine", "cosine_minimum": 1e-6},
    "run": {"epochs": 600},
    "validation": {"protocol": "dcmp-test"},
}

PRESETS: dict[str, dict[str, Any]] = {
    "mitnet-its": {"system": "mitnet", "validation": {"protocol": "mitnet-crop16"}},
    "mitnet-ots": {"system": "mitnet", "run": {"epochs": 2000}, "validation": {"protocol": "mitnet-crop16"}},
    "mitnet-dense": _MITNET_REAL,
    "mitnet-nh": _MITNET_REAL,
    "mitnet-ohaze": _MITNET_REAL,
    "mitnet-ihaze": _MITNET_REAL,
    "dcmpnet-its": _DCMPNET,
    "dcmpnet-ots": _DCMPNET,
}
"""Published settings by set. ``mitnet-ohaze`` and ``mitnet-ihaze`` take over those of the other two real-world sets."""


def load_config(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Configuration:
    """Build a configuration from a preset, a YAML file or a mapping, with overrides on top.

    Args:
        source: name of a preset; path of a YAML file; or a mapping. File and mapping have the layout
            of ``config.yaml`` in a run folder and may be partial: what is missing comes from the
            preset they name, or else from the defaults of their ``system``.
        overrides: ``section.field=value``, value in YAML; later ones win.

    Returns:
        The whole configuration, every value checked.

    Raises:
        ConfigError: no such preset or file, not YAML, or fields that are unknown or out of range.
    """
    if isinstance(source, Mapping):
        values = dict(source)
    elif str(source) in PRESETS:
        values = {"preset": str(source)}
    else:
        values = _read_yaml(Path(source))
    name = values.get("preset")
    if name is not None:
        if not isinstance(name, str) or name not in PRESETS:
            raise ConfigError(f"preset: got {name!r}, allowed are {', '.join(PRESETS)}" + _similar(name, PRESETS))
        values = merge(PRESETS[name], values)
    for override in overrides:
        values = merge(values, parse_override(override))
    system = values.get("system")
    if not isinstance(system, str) or system not in SYSTEMS:
        raise ConfigError(f"system: got {system!r}, allowed are {', '.join(SYSTEMS)}; or name a preset")
    try:
        return SYSTEMS[system].model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, SYSTEMS[system])) from None


def load_changes(source: str | Path | None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What a preset's name or a YAML file states by itself, with overrides on top: changes to a saved configuration.

    Args:
        source: name of a preset, which states nothing but its name; path of a YAML file; or None.
        overrides: as for :func:`load_config`.

    Raises:
        ConfigError: no such preset or file, or not YAML.
    """
    changes: dict[str, Any] = {}
    if source is not None:
        changes = {"preset": str(source)} if str(source) in PRESETS else _read_yaml(Path(source))
    for override in overrides:
        changes = merge(changes, parse_override(override))
    return changes


def parse_override(text: str) -> dict[str, Any]:
    """Turn ``a.b=c`` into ``{"a": {"b": c}}``, c read as YAML.

    Raises:
        ConfigError: no name, no ``=``, or a value that is not YAML.
    """
    name, equals, value = text.partition("=")
    parts = [part.strip() for part in name.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"override {text!r}: expected section.field=value, for example run.epochs=10")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not YAML: {_first_line(error)}") from error
    for part in reversed(parts):
        parsed = {part: parsed}
    return parsed


def to_yaml(config: Configuration) -> str:
    """The whole configuration as YAML that :func:`load_config` reads back unchanged.

    Args:
        config: of any system.
    """
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``, section by section."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping from dotted names to values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(
            f"configuration: {str(path)!r} is neither a preset nor a YAML file; presets are {', '.join(PRESETS)}"
            + _similar(str(path), PRESETS)
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {_first_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections with fields, got {type(values).__name__}")
    return values


def _explain(error: ValidationError, model: type[Section]) -> str:
    lines = []
    for entry in error.errors(include_url=False):
        *parents, last = entry["loc"] or ("",)
        name = ".".join(str(part) for part in entry["loc"])
        if entry["type"] == "extra_forbidden":
            fields = _fields_at(model, parents)
            lines.append(f"{name}: no such field; allowed are {', '.join(fields)}" + _similar(str(last), fields))
        elif entry["type"] == "value_error":
            lines.append(str(entry["ctx"]["error"]))
        else:
            lines.append(f"{name}: got {entry['input']!r}; {entry['msg'][0].lower()}{entry['msg'][1:]}")
    return "\n".join(lines)


def _fields_at(model: type[Section], parents: list[Any]) -> list[str]:
    for parent in parents:
        model = model.model_fields[parent].annotation
    return list(model.model_fields)


def _similar(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())
