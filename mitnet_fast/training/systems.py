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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, StepLR
from torch.optim.swa_utils import AveragedModel

from ..data.images import to_float
from ..losses.dcmpnet import DCMPNetLoss
from ..losses.mitnet import MITNetLoss
from ..losses.mutual_information import LATENT
from ..models import DCMPNet, DepthNet, DepthSharingDCMPNet, MITNet
from ..weights import load_weights
from .config import ConfigError, Configuration, DCMPNetConfiguration, MITNetConfiguration, Schedule
from .distributed import Processes
from .sampler import Share
from .step import CudaGraph, GraphedStep, Step, why_no_graph

Batch = Mapping[str, torch.Tensor]
ALONE = Processes()
OPTIMIZER_OPTIONS = {"fused": True}  # fused: it leaves everything as it is where told so on the device


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
        steps: number of steps so far, those that were skipped included.
        skipped: number of steps skipped so far.
        say: told once where steps cannot run as ``run.step`` asks, and why; warns by default.
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
        if config.run.compile is not None and config.run.step != "compile":
            self.modules["network"].compile(backend=config.run.compile, dynamic=False)
        self.parameters = {
            name: [p for module in names for p in self.modules[module].parameters() if p.requires_grad]
            for name, names in optimized.items()
        }
        self.optimizers = {
            name: torch.optim.Adam(
                parameters, lr=config.optimizer.lr, betas=config.optimizer.betas, **OPTIMIZER_OPTIONS
            )
            for name, parameters in self.parameters.items()
        }
        self.schedulers = {
            name: _scheduler(optimizer, config.schedule, config.run.epochs)
            for name, optimizer in self.optimizers.items()
        }
        self.average = None
        if config.run.ema is not None:
            self.average = AveragedModel(deployed).requires_grad_(False).eval()
        self._statistics = [b for names in optimized.values() for name in names for b in self.modules[name].buffers()]
        # what a step reads besides its batch: on the device, so that a recorded step follows the schedule
        self._learning_rate = torch.zeros((), device=device)
        self._average_share = torch.zeros((), device=device)
        self._names: tuple[str, ...] = ()
        self._losses = self.losses
        self._run_step: Step | None = None
        self.say: Callable[[str], None] = lambda message: warnings.warn(message, stacklevel=2)
        self.steps = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._count = 0

    @abc.abstractmethod
    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The losses of a batch and their terms; "total" is what is minimised."""

    def backward(self, batch: Batch, scale: float) -> dict[str, torch.Tensor]:
        """Add ``scale`` times the gradients of the losses of a batch; returns the losses and their terms."""
        terms = self._losses(batch)
        (scale * terms["total"]).backward()
        return terms

    def draw(self, share: Share) -> dict[str, torch.Tensor]:
        """Random numbers that the losses of a share of a batch need, by name, one row a sample.

        They depend on the seed, the number of steps and the samples' places in the whole batch, so they are the same
        whatever the number of processes, and after a resume.
        """
        return {}

    @property
    def network(self) -> nn.Module:
        """The network with the weights to use: averaged where they are averaged."""
        return self.deployed if self.average is None else self.average.module

    @property
    def learning_rate(self) -> float:
        """Of the step to come; all optimizers follow the same schedule."""
        return next(iter(self.optimizers.values())).param_groups[0]["lr"]

    def training_step(self, batch: Batch, share: Share | None = None) -> dict[str, float]:
        """Train on one batch.

        Args:
            batch: this process's share, see the module; cut into ``optimizer.accumulate`` parts, as equal
                as can be. The gradients of all parts of all processes are averaged, weighted by their
                numbers of samples. Statistics of a batch norm, and ratios of means, are those of a part.
            share: which samples of the whole batch these are; None: all of them.

        Returns:
            Losses and terms, before weighting, averaged like the gradients, and the norm of each
            optimizer's gradients before clipping. Not finite when the step was skipped. The same in
            every process.

        Raises:
            ValueError: something is missing in the batch.
            TrainingDiverged: ``run.max_nonfinite`` steps in a row were skipped.
        """
        inputs = self._inputs(batch, share)
        if self._run_step is None:
            self._run_step = self._as_asked(inputs)
        self._learning_rate.fill_(self.learning_rate)
        if self.average is not None:  # the first weights are taken as they are
            self._average_share.fill_(1 - self.config.run.ema if self.average.n_averaged > 0 else 1.0)
        results = self._run_step(inputs).tolist()  # waits for the device, once
        values = dict(zip(self._names, results, strict=True))
        self.steps += 1
        if all(math.isfinite(value) for value in results):
            self.skipped_in_a_row = 0
            if self.average is not None:
                self.average.n_averaged += 1
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.config.run.max_nonfinite:
            raise TrainingDiverged(self._advice(values))
        return values

    def step(self, inputs: Batch) -> torch.Tensor:
        """The device's part of a step: everything between a batch that is there and numbers to read back.

        Nothing in it waits for the device or depends on numbers there, so it can be recorded: whether the
        step is finite is decided where it is computed.

        Args:
            inputs: whole batch and what :meth:`draw` drew for it.

        Returns:
            Losses, terms and norms in the order of their names, [n] float32.
        """
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()  # also what a recording that failed has left
        before = [buffer.clone() for buffer in self._statistics]
        sums: dict[str, torch.Tensor] = {}
        for part in self._parts(inputs):
            weight = len(part["hazy"]) / len(inputs["hazy"])
            for name, value in self.backward(part, weight).items():
                sums[name] = sums.get(name, 0) + value.detach().float() * weight
        gradients = [p.grad for parameters in self.parameters.values() for p in parameters if p.grad is not None]
        statistics = [buffer for buffer in self._statistics if buffer.is_floating_point()]
        self.processes.average_([*gradients, *statistics, *sums.values()], weight=self._count)
        for name, parameters in self.parameters.items():
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if self.config.optimizer.clip is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.config.optimizer.clip, norm)
            sums["gradient_norm" if len(self.parameters) == 1 else f"{name}_gradient_norm"] = norm
        self._names = tuple(sums)
        values = torch.stack(list(sums.values()))
        finite = torch.isfinite(values).all()
        for buffer, value in zip(self._statistics, before, strict=True):
            buffer.copy_(torch.where(finite, buffer, value))
        self._update(finite)
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
            "steps": self.steps,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for name, optimizer in self.optimizers.items():
            saved = state["optimizers"][name]
            groups = [group | OPTIMIZER_OPTIONS for group in saved["param_groups"]]
            optimizer.load_state_dict({**saved, "param_groups": groups})
            self.schedulers[name].load_state_dict(state["schedulers"][name])
        self._run_step = None  # a recorded step works on tensors that are no more
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.steps = state["steps"]
        self.skipped = state["skipped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]

    def autocast(self) -> torch.autocast:
        """The arithmetic of networks and losses."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bfloat16")

    def _inputs(self, batch: Batch, share: Share | None) -> dict[str, torch.Tensor]:
        """The batch on the device, and what is drawn for it."""
        missing = [name for name in self.batch_names if name not in batch]
        if missing:
            raise ValueError(f"batch: {', '.join(missing)} missing, it holds {', '.join(batch)}")
        size = len(batch["hazy"])
        share = share or Share(0, size, size)
        self._count = share.count
        inputs = {
            name: batch[name].to(self.device, non_blocking=True, memory_format=self.memory_format)
            for name in self.batch_names
        }
        return inputs | self.draw(share)

    def _parts(self, inputs: Batch) -> Iterator[dict[str, torch.Tensor]]:
        parts = min(self.config.optimizer.accumulate, len(inputs["hazy"]))
        for chunks in zip(*(value.tensor_split(parts) for value in inputs.values()), strict=True):
            yield {
                name: to_float(value).contiguous(memory_format=self.memory_format)
                if value.dtype == torch.uint8
                else value
                for name, value in zip(inputs, chunks, strict=True)
            }

    def _as_asked(self, inputs: Batch) -> Step:
        """The step as ``run.step`` asks for it, or as near to it as this machine comes."""
        kind = self.config.run.step
        if kind == "cuda_graph":
            reason = why_no_graph(self.device, self.processes)
            if reason is None:
                return GraphedStep(self.step, CudaGraph(), self.say)
            self.say(f"run.step: cuda_graph is not possible here, steps run call by call: {reason}")
        elif kind == "compile":
            self._compile(inputs)
        return self.step

    def _compile(self, inputs: Batch) -> None:
        """Compile the losses with their networks, or leave them as they are where that fails."""
        before = [buffer.clone() for buffer in self._statistics]
        try:
            self._losses = torch.compile(self.losses, backend=self.config.run.compile or "inductor", dynamic=False)
            self.backward(next(self._parts(inputs)), 1.0)
        except Exception as error:  # of the compiler: what is wrong with the batch is found again without it
            self._losses = self.losses
            self.say(
                f"run.step: steps do not compile and run as they are: {type(error).__name__}: {_first_line(error)}"
            )
        for buffer, value in zip(self._statistics, before, strict=True):
            buffer.copy_(value)

    @torch.no_grad()
    def _update(self, finite: torch.Tensor) -> None:
        """Move weights and averages on where ``finite``, and leave them bit for bit as they are where not."""
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        as_recorded = {"lr": self._learning_rate, "capturable": capturing}
        for optimizer in self.optimizers.values():
            optimizer.found_inf = 1 - finite.float()
            groups = [dict(group) for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group.update(as_recorded)
            optimizer.step()
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.update(before)
        if self.average is None:
            return
        # running statistics are averaged as the weights are: they belong to each other
        pairs = list(zip(_weights(self.average.module), _weights(self.deployed), strict=True))
        share = torch.where(finite, self._average_share, 0.0)
        averages, values = ([pair[side] for pair in pairs if pair[side].is_floating_point()] for side in (0, 1))
        torch._foreach_mul_(averages, 1 - share)
        torch._foreach_add_(averages, torch._foreach_mul(values, share))
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)

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

    def draw(self, share: Share) -> dict[str, torch.Tensor]:
        """See :meth:`System.draw`; the regulariser's noise, [B, levels, 2, 4]."""
        levels = len(self.loss.mutual_information)
        if not levels:
            return {}
        generator = np.random.default_rng((self.config.run.seed, self.steps))
        noise = torch.from_numpy(generator.standard_normal((share.size, levels, 2, LATENT), np.float32))
        mine = noise[share.start : share.start + share.count] if share.count else noise[:1]
        return {"noise": mine.to(self.device, non_blocking=True)}

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """See :meth:`System.losses`."""
        noise = None
        if "noise" in batch:
            noise = [level.unbind(1) for level in batch["noise"].unbind(1)]
        with self.autocast():
            output = self.deployed(batch["hazy"])
            return self.loss(output, batch["hazy"], batch["clear"], noise)


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

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """See :meth:`System.losses`; the networks see images in [-1, 1]."""
        hazy, clear = 2 * batch["hazy"] - 1, 2 * batch["clear"] - 1
        height, width = hazy.shape[2:]
        with self.autocast():
            prior = None
            if self.config.network.share_depth:
                with torch.no_grad():
                    prior = self.depth_network(hazy)[..., :height, :width]
            restored = self.dehazing_network(hazy, prior).restored
            return self.loss(restored, hazy, clear, self.depth_network, batch.get("depth"))


def build_system(config: Configuration, device: torch.device, processes: Processes = ALONE) -> System:
    """The system that a configuration describes, with new weights drawn from the global generator.

    Args:
        config: of the run.
        device: where everything lives.
        processes: that train together.

    Raises:
        ConfigError, FileNotFoundError, CheckpointError, RuntimeError: see the systems.
    """
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


def _weights(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
