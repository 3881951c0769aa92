"""Systems: networks with their losses and optimizers, trained batch by batch.

A batch is a mapping of tensors: ``hazy`` and ``clear`` [B, 3, H, W] in [0, 1] (or uint8), and
``depth`` [B, 1, H, W] in [0, 1] (1 nearest) where the loss needs it. One :meth:`System.training_step` is one
step of every optimizer. A step in which a loss or a gradient is not finite leaves no trace: weights,
optimizers, averages and running statistics stay as they were.
"""

from __future__ import annotations

import abc
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..data.images import to_float
from ..losses.dcmpnet import DCMPNetLoss
from ..losses.mitnet import MITNetLoss
from ..models import DCMPNet, DepthNet, MITNet
from ..weights import DepthSharingDCMPNet, load_weights
from .config import ConfigError, Configuration, DCMPNetConfiguration, MITNetConfiguration, Schedule
from .distributed import Processes

Batch = Mapping[str, torch.Tensor]
ALONE = Processes()


class TrainingDiverged(RuntimeError):
    """Too many steps in a row gave a loss or gradient that is not finite."""


class System(abc.ABC):
    """Networks, losses, optimizers, schedules and averaged weights of one way of training.

    Args:
        config: of the run.
        device: where everything lives.
        modules: every module with state, by name, in the order in which checkpoints hold them.
        deployed: the network that restores images and whose weights are saved: ``modules["network"]``,
            the dehazing network, or one that contains it.
        optimized: the names of the modules that each optimizer trains.
        processes: that train together, each with its share of every batch.

    Attributes:
        batch_names: what a batch must hold.
        skipped: number of steps skipped so far.
    """

    batch_names: tuple[str, ...] = ("hazy", "clear")

    def __init__(
        self,
        config: Configuration,
        device: torch.device,
        *,
        modules: Mapping[str, nn.Module],
        deployed: nn.Module,
        optimized: Mapping[str, tuple[str, ...]],
        processes: Processes,
    ) -> None:
        self.config = config
        self.device = device
        self.processes = processes
        self.memory_format = torch.channels_last if config.run.channels_last else torch.contiguous_format
        if config.run.weights is not None:
            _start_from(deployed, config)
        self.modules = nn.ModuleDict(modules).to(device, memory_format=self.memory_format).train()
        self.deployed = deployed
        if config.run.compile is not None:
            self.modules["network"].compile(backend=config.run.compile, dynamic=False)
        self.parameters = {
            name: [p for module in names for p in self.modules[module].parameters() if p.requires_grad]
            for name, names in optimized.items()
        }
        self.optimizers = {
            name: torch.optim.Adam(parameters, lr=config.optimizer.lr, betas=config.optimizer.betas)
            for name, parameters in self.parameters.items()
        }
        self.schedulers = {
            name: _scheduler(optimizer, config.schedule, config.run.epochs)
            for name, optimizer in self.optimizers.items()
        }
        self.average = None
        if config.run.ema is not None:
            # running statistics are averaged as the weights are: they belong to each other
            self.average = AveragedModel(deployed, multi_avg_fn=get_ema_multi_avg_fn(config.run.ema), use_buffers=True)
            self.average.requires_grad_(False).eval()
        self._statistics = [b for names in optimized.values() for name in names for b in self.modules[name].buffers()]
        self.skipped = 0
        self.skipped_in_a_row = 0

    @abc.abstractmethod
    def backward(self, batch: Batch, scale: float) -> dict[str, torch.Tensor]:
        """Add ``scale`` times the gradients of the losses of a batch; returns the losses and their terms."""

    @property
    def network(self) -> nn.Module:
        """The network with the weights to use: averaged where they are averaged."""
        return self.deployed if self.average is None else self.average.module

    @property
    def learning_rate(self) -> float:
        """Of the step to come; all optimizers follow the same schedule."""
        return next(iter(self.optimizers.values())).param_groups[0]["lr"]

    def training_step(self, batch: Batch) -> dict[str, float]:
        """Train on one batch.

        Args:
            batch: this process's share, see the module; cut into ``optimizer.accumulate`` equal parts.
                The gradients of all parts of all processes are averaged. Statistics of a batch norm,
                and ratios of means, are those of a part.

        Returns:
            Losses and terms, before weighting, averaged like the gradients, and the norm of each
            optimizer's gradients before clipping. Not finite when the step was skipped. The same in
            every process.

        Raises:
            ValueError: something is missing in the batch, or it cannot be cut so.
            TrainingDiverged: ``run.max_nonfinite`` steps in a row were skipped.
        """
        before = [buffer.clone() for buffer in self._statistics]
        sums: dict[str, torch.Tensor] = {}
        parts = self.config.optimizer.accumulate
        for part in self._parts(batch, parts):
            for name, value in self.backward(part, 1 / parts).items():
                sums[name] = sums.get(name, 0) + value.detach().float() / parts
        gradients = [p.grad for parameters in self.parameters.values() for p in parameters if p.grad is not None]
        statistics = [buffer for buffer in self._statistics if buffer.is_floating_point()]
        self.processes.average_([*gradients, *statistics, *sums.values()])
        for name, parameters in self.parameters.items():
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if self.config.optimizer.clip is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.config.optimizer.clip, norm)
            sums["gradient_norm" if len(self.parameters) == 1 else f"{name}_gradient_norm"] = norm
        values = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))  # waits for the device once
        if all(math.isfinite(value) for value in values.values()):
            self._update()
        else:
            self._skip(before)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        if self.skipped_in_a_row >= self.config.run.max_nonfinite:
            raise TrainingDiverged(self._advice(values))
        return values

    def end_epoch(self) -> None:
        """Move every schedule on by one epoch."""
        with warnings.catch_warnings():
            # a run resumed at the very end of an epoch has taken no step yet in this process
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for scheduler in self.schedulers.values():
                scheduler.step()

    def restore(self, image: torch.Tensor) -> torch.Tensor:
        """Restore hazy images [B, 3, H, W] in [0, 1] of any size with the weights to use; not clamped."""
        with torch.compiler.set_stance("force_eager"):  # what is compiled for patches is not compiled for every size
            return self.network.restore(image.to(self.device, memory_format=self.memory_format))

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes, as tensors and plain data."""
        return {
            "modules": {name: dict(module.state_dict()) for name, module in self.modules.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "schedulers": {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()},
            "average": None if self.average is None else dict(self.average.state_dict()),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
            self.schedulers[name].load_state_dict(state["schedulers"][name])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.skipped = state["skipped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]

    def autocast(self) -> torch.autocast:
        """The arithmetic of networks and losses."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bfloat16")

    def _parts(self, batch: Batch, parts: int) -> Iterator[dict[str, torch.Tensor]]:
        missing = [name for name in self.batch_names if name not in batch]
        if missing:
            raise ValueError(f"batch: {', '.join(missing)} missing, it holds {', '.join(batch)}")
        size = len(batch["hazy"])
        if size % parts:
            raise ValueError(f"batch: {size} images cannot be cut into optimizer.accumulate = {parts} equal parts")
        for start in range(0, size, size // parts):
            part = {
                name: batch[name][start : start + size // parts].to(
                    self.device, non_blocking=True, memory_format=self.memory_format
                )
                for name in self.batch_names
            }
            yield {
                name: to_float(value).contiguous(memory_format=self.memory_format)
                if value.dtype == torch.uint8
                else value
                for name, value in part.items()
            }

    def _update(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.deployed)
        self.skipped_in_a_row = 0

    def _skip(self, before: list[torch.Tensor]) -> None:
        for buffer, value in zip(self._statistics, before, strict=True):
            buffer.copy_(value)
        self.skipped += 1
        self.skipped_in_a_row += 1

    def _advice(self, values: Mapping[str, float]) -> str:
        culprits = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        optimizer, advice = self.config.optimizer, []
        if optimizer.clip is None:
            advice.append("limit the gradients (optimizer.clip=1)")
        advice.append(f"lower the learning rate (optimizer.lr={optimizer.lr / 2:g})")
        if self.config.run.precision == "bfloat16":
            advice.append("compute in full precision (run.precision=float32)")
        return (
            f"{self.skipped_in_a_row} steps in a row were not finite ({culprits}); weights are as they were before "
            f"them. Look for broken images in the training set, or {'; or '.join(advice)}"
        )


class MITNetSystem(System):
    """MITNet with its loss; the mutual information regularisers learn along in scalable mode."""

    def __init__(self, config: MITNetConfiguration, device: torch.device, processes: Processes = ALONE) -> None:
        network = MITNet(
            width=config.network.width, depth=config.network.depth, decoder_spectral=config.network.decoder_spectral
        )
        self.loss = MITNetLoss(
            config.network.width,
            config.network.depth,
            spectral_weight=config.loss.spectral_weight,
            mutual_information_weight=config.loss.mutual_information_weight,
            ssim_weight=config.loss.ssim_weight,
            mutual_information=config.loss.mutual_information,
        )
        super().__init__(
            config,
            device,
            modules={"network": network, "loss": self.loss},
            deployed=network,
            optimized={"restoration": ("network", "loss")},
            processes=processes,
        )

    def backward(self, batch: Batch, scale: float) -> dict[str, torch.Tensor]:
        """See :meth:`System.backward`."""
        with self.autocast():
            output = self.deployed(batch["hazy"])
            terms = self.loss(output, batch["hazy"], batch["clear"])
        (scale * terms["total"]).backward()
        return terms


class DCMPNetSystem(System):
    """DCMPNet and the depth network, which learn from each other's mistakes, with an optimizer each.

    One backward pass of the sum of both losses gives each network the gradients of its own loss in
    mode "difference_perception", and of both in mode "official". With ``data.depth`` none there is
    no depth network, and the depth terms are left out.

    Raises:
        ConfigError: patches too small for the network.
        FileNotFoundError, CheckpointError, RuntimeError: no weights of VGG-19, see
            :func:`~mitnet_fast.losses.contrastive.load_vgg19`.
    """

    def __init__(self, config: DCMPNetConfiguration, device: torch.device, processes: Processes = ALONE) -> None:
        network = DCMPNet(**config.network.model_dump())
        if config.data.patch < network.smallest_side:
            raise ConfigError(f"data.patch: got {config.data.patch}, the network needs {network.smallest_side} or more")
        modules = {"network": network}
        optimized = {"dehazing": ("network",)}
        deployed: nn.Module = network
        if config.data.depth != "none":
            modules["depth"] = DepthNet(config.network.depth_widths, config.network.growth)
            optimized["depth"] = ("depth",)
            self.batch_names = ("hazy", "clear", "depth")
            if config.network.share_depth:
                deployed = DepthSharingDCMPNet(network, modules["depth"])
        self.loss = modules["loss"] = DCMPNetLoss(
            config.loss.mode,
            depth_weight=config.loss.depth_weight,
            contrastive_weight=config.loss.contrastive_weight,
            vgg_weights=config.loss.vgg_weights,
        )
        super().__init__(config, device, modules=modules, deployed=deployed, optimized=optimized, processes=processes)
        self.dehazing_network = network
        self.depth_network = modules.get("depth")

    def backward(self, batch: Batch, scale: float) -> dict[str, torch.Tensor]:
        """See :meth:`System.backward`; the networks see images in [-1, 1]."""
        hazy, clear = 2 * batch["hazy"] - 1, 2 * batch["clear"] - 1
        height, width = hazy.shape[2:]
        with self.autocast():
            prior = None
            if self.config.network.share_depth:
                with torch.no_grad():
                    prior = self.depth_network(hazy)[..., :height, :width]
            restored = self.dehazing_network(hazy, prior).restored
            terms = self.loss(restored, hazy, clear, self.depth_network, batch.get("depth"))
        (scale * terms["total"]).backward()
        return terms


def build_system(config: Configuration, device: torch.device, processes: Processes = ALONE) -> System:
    """The system that a configuration describes, with new weights drawn from the global generator."""
    return {"mitnet": MITNetSystem, "dcmpnet": DCMPNetSystem}[config.system](config, device, processes)


def _start_from(network: nn.Module, config: Configuration) -> None:
    """Load ``run.weights`` into a new network."""
    source, _ = load_weights(config.run.weights)
    if type(source) is not type(network) or source.config != network.config:
        raise ConfigError(
            f"run.weights: {config.run.weights} holds {type(source).__name__}({source.config}), the run trains "
            f"{type(network).__name__}({network.config})"
        )
    network.load_state_dict(source.state_dict())


def _scheduler(optimizer: torch.optim.Optimizer, schedule: Schedule, epochs: int) -> LRScheduler:
    if schedule.kind == "halve":
        return StepLR(optimizer, schedule.halve_every, gamma=0.5)
    if schedule.kind == "cosine":
        return CosineAnnealingLR(optimizer, epochs, eta_min=schedule.cosine_minimum)
    return ConstantLR(optimizer, factor=1.0)
