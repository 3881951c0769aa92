"""The training loop, for every system.

A run lives in a folder:

    config.yaml               the whole configuration
    versions.json             versions of everything, one entry per start
    log.csv, validation.csv   losses by step, scores by epoch
    last.pt, previous.pt      state to go on from, and the one before it
    best.pt                   state with the best validation PSNR
    epoch-00010.pt, …         states kept for good, where asked for
    last.safetensors, best.safetensors   weights with their card
    tensorboard/              the curves of both CSV files, where asked for

The state holds everything that the next step depends on, and the order of the samples depends only on
seed and epoch. So a run that is stopped or killed, and resumed, ends with the same weights as one that
was not: bit for bit on the CPU, where the computation itself is reproducible.
"""

from __future__ import annotations

import datetime
import json
import math
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import Dataset

from ..data.files import atomic_write
from ..data.layouts import DataError
from ..data.paired import PairedImages
from ..evaluation import PROTOCOLS, score
from ..weights import describe, save_weights, versions
from .checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state
from .config import ConfigError, Configuration, flatten, load_config, merge, to_yaml
from .distributed import Processes, join
from .loader import batches
from .logs import Clock, CsvLog, Curves, Display, Means, check_tensorboard
from .sampler import EpochBatches
from .systems import TrainingDiverged, build_system

OWN_FILES = (
    "config.yaml",
    "versions.json",
    "log.csv",
    "validation.csv",
    "last.pt",
    "previous.pt",
    "best.pt",
    "epoch-*.pt",
    "last.safetensors",
    "best.safetensors",
    "tensorboard/events.*",
)

# what a resumed run may change, because the result does not depend on it or is meant to go on
FREE_FIELDS = (
    "data.root",
    "data.validation_root",
    "data.workers",
    "loss.vgg_weights",
    "run.device",
    "run.step",
    "run.weights",
    "run.max_nonfinite",
    "validation.",
    "output.",
)


class RunFolderError(ValueError):
    """A run folder that holds a run already, or none to resume."""


@dataclass(frozen=True)
class TrainingResult:
    """What a call of :func:`train` did.

    Attributes:
        run_dir: the run's folder.
        finished: all epochs are done; otherwise ``train(…, resume=True)`` goes on.
        step: steps done in all.
        epoch: epochs done in all.
        scores: the last validation: mean PSNR (dB) and SSIM, and the number of images; None without one.
        best: the best of them by PSNR, with its ``epoch``.
        skipped: non-finite steps skipped in all.
        images_per_second: of this call.
        data_wait: share of this call's training time spent waiting for data.
        weights: the weights after the last step.
        best_weights: the weights of ``best``; None without a validation.
    """

    run_dir: Path
    finished: bool
    step: int
    epoch: int
    scores: dict[str, float] | None
    best: dict[str, float] | None
    skipped: int
    images_per_second: float
    data_wait: float
    weights: Path
    best_weights: Path | None


def train(
    config: Configuration | None,
    run_dir: str | PathLike[str],
    *,
    resume: bool | str | PathLike[str] = False,
    changes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    datasets: tuple[Dataset, Dataset | None] | None = None,
    max_steps: int | None = None,
    card: Mapping[str, Any] | None = None,
    progress: bool = True,
    console: Console | None = None,
) -> TrainingResult:
    """Train a system, from the beginning or from where a run stopped.

    Whatever can be wrong with configuration, data, depth maps or weights is found before the first
    step. Ctrl-C (or SIGTERM) finishes the step, writes ``last.pt`` and returns; a second one stops at
    once, and then ``last.pt`` is the one before. Started by torchrun, all processes train together,
    each with its share of every batch, and the first one writes the files.

    Args:
        config: of the run. With ``resume`` it may be None (as it was), and may differ from that of
            the checkpoint only where the result does not depend on it.
        run_dir: folder of the run; made if it is missing.
        resume: True: from ``last.pt`` in ``run_dir``; a path: from that checkpoint.
        changes: with ``resume`` and without ``config``: the sections and fields that are to differ from
            the checkpoint's configuration, see :func:`~mitnet_fast.training.load_changes`.
        overwrite: delete the run that ``run_dir`` holds. Other files there are left alone.
        datasets: what to train and to validate on instead of the folders in ``config``. Items are
            mappings with ``hazy`` and ``clear`` [3, H, W] in [0, 1], and ``depth`` [1, H, W] where
            the loss needs it; in training H = W = ``data.patch``. To resume exactly, an item may
            depend only on its index and what ``set_epoch(epoch)``, if there is one, was told.
        max_steps: stop after so many steps in all, once they are done.
        card: further fields for the cards of the weights, see :func:`~mitnet_fast.weights.save_weights`.
        progress: show a progress bar.
        console: to show it on.

    Returns:
        What was done, and the scores.

    Raises:
        ConfigError: a field is missing, or does not fit the data or the checkpoint.
        RunFolderError: ``run_dir`` holds a run and neither ``resume`` nor ``overwrite`` is given, or
            there is none to resume.
        CheckpointError: the checkpoint is damaged; the newest good one is named.
        TrainingDiverged: too many steps in a row were not finite.
        ValueError: the data do not fit; see :class:`~mitnet_fast.data.paired.PairedImages`.
    """
    processes = join()
    trainer = _Trainer(config, Path(run_dir), resume, changes or {}, overwrite, datasets, card, processes)
    with _StopRequest(patient=processes.size > 1) as stop:
        return trainer.run(stop, max_steps, progress and processes.first, console or Console())


class _Trainer:
    """A run: everything checked and built by the constructor, then trained by :meth:`run`."""

    def __init__(
        self,
        config: Configuration | None,
        folder: Path,
        resume: bool | str | PathLike[str],
        changes: Mapping[str, Any],
        overwrite: bool,
        datasets: tuple[Dataset, Dataset | None] | None,
        card: Mapping[str, Any] | None,
        processes: Processes,
    ) -> None:
        self.folder = folder
        self.processes = processes
        checkpoint = _checkpoint_to_resume(folder, resume, overwrite)
        self.config = config = _resumed_config(config, changes, checkpoint)
        self.device = _device(config.run.device, processes)
        if config.validation.every and config.validation.protocol not in PROTOCOLS:
            raise ConfigError(
                f"validation.protocol: got {config.validation.protocol!r}, allowed are {', '.join(PROTOCOLS)}"
            )
        self.train_set, self.validation_set = datasets or _open_datasets(config)
        self.how_to_resume = f"train again with resume=True and run_dir={str(folder)!r}"
        if datasets is None:
            # not --run, which torchrun takes for its own --run-path
            self.how_to_resume = f"type: mitnet-fast train --resume -r {folder}"
        self.batches = EpochBatches(
            len(self.train_set),
            config.data.batch,
            config.run.seed,
            config.run.steps_per_epoch,
            drop_last=config.data.drop_last,
            rank=processes.rank,
            shares=processes.size,
        )
        share = config.data.batch // processes.size
        if share % config.optimizer.accumulate:
            raise ConfigError(
                f"optimizer.accumulate: got {config.optimizer.accumulate}, which does not divide the "
                f"{share} samples of a batch that each of {processes.size} processes takes"
            )

        _seed_everything(config.run.seed)
        self.system = build_system(config, self.device, processes)
        if not processes.first:
            _seed_everything(config.run.seed + processes.rank)  # the same weights, but noise of its own
        self._check_data()
        self.epoch = self.step_in_epoch = self.step = 0
        self.scores: dict[str, float] | None = None
        self.best: dict[str, float] | None = None
        self.means = Means()
        self.clock = Clock()
        self.card = dict(card or (checkpoint or {}).get("card", {}))
        self.log = CsvLog(folder / "log.csv")
        self.validation_log = CsvLog(folder / "validation.csv")
        if config.output.tensorboard:
            check_tensorboard()
        if checkpoint is not None:
            self._load(checkpoint)
        if processes.sum([self.step])[0] != processes.size * self.step:  # waits until all have seen the folder
            raise RunFolderError(
                f"{folder}: processes found different states in it; it must be on a shared file system"
            )
        if processes.first:
            self._prepare_folder(overwrite)
        if checkpoint is None:
            self._save()
        elif resume is True:
            self._save_weights("last")  # a kill may have come between the state and its weights
        else:
            self._save(keep=False)  # what stood there is damaged or not wanted; previous.pt is better

    def run(self, stop: _StopRequest, max_steps: int | None, progress: bool, console: Console) -> TrainingResult:
        """Train until the end, ``max_steps`` or a stop."""
        config = self.config
        self.stop = stop
        self.stopping = False  # what all processes agreed on
        total = config.run.epochs * self.batches.steps
        self.display = Display(console, progress, steps=total, done=self.step, epochs=config.run.epochs)
        self.curves = Curves(self.folder / "tensorboard", config.output.tensorboard and self.processes.first, self.step)
        self.system.say = self.display.say
        with self.display, self.curves:
            try:
                while self.epoch < config.run.epochs and not self._to_stop(max_steps):
                    self._train_epoch(max_steps)
                    if self.step_in_epoch == self.batches.steps and not self.stopping:
                        self._end_epoch()
            except DataError as error:
                raise DataError(f"{error}\n{self._saved_for_later()}") from error
            except KeyboardInterrupt:
                self.display.say(f"stopped at once, in the step after {self.step}; {self._saved_before()}")
                raise
            finished = self.epoch == config.run.epochs
            if not finished:
                if self.saved != (self.epoch, self.step_in_epoch):
                    self._save()
                self.display.say(f"stopped after step {self.step} of {total}; to go on, {self.how_to_resume}")
            if self.clock.images:
                self.display.say(self._account())
        self.processes.wait()  # until the files are there
        best_weights = self.folder / "best.safetensors"
        return TrainingResult(
            run_dir=self.folder,
            finished=finished,
            step=self.step,
            epoch=self.epoch,
            scores=self.scores,
            best=self.best,
            skipped=self.system.skipped,
            images_per_second=self.clock.images_per_second,
            data_wait=self.clock.data_wait,
            weights=self.folder / "last.safetensors",
            best_weights=None if self.best is None else best_weights,
        )

    def _saved_for_later(self) -> str:
        """Save the state where this process can do so alone, and say from which step the run will go on."""
        if self.processes.size == 1 and self.saved != (self.epoch, self.step_in_epoch):
            self._save()
        return self._saved_before()

    def _saved_before(self) -> str:
        return f"the run is saved as it was after step {self.saved_step}; to go on, {self.how_to_resume}"

    def _account(self) -> str:
        """This start in one line."""
        skipped = f" ({self.system.skipped} skipped: not finite)" if self.system.skipped else ""
        return (
            f"{self.step} steps{skipped}, {self.clock.images_per_second:.3g} images/s, {self.clock.data_wait:.0%} of "
            f"the time waiting for data; weights: {self.folder / 'last.safetensors'}"
        )

    def _to_stop(self, max_steps: int | None) -> bool:
        return self.stopping or (max_steps is not None and self.step >= max_steps)

    def _train_epoch(self, max_steps: int | None) -> None:
        """The steps of the epoch that are left, or as many as are asked for."""
        if self.step_in_epoch == self.batches.steps:
            return  # stopped between the last step of an epoch and its end
        asked = ended = time.perf_counter()
        for batch in self._train_batches():
            came = time.perf_counter()
            learning_rate = self.system.learning_rate
            share = self.batches.share(self.step_in_epoch)
            try:
                values = self.system.training_step(batch, share)
            except TrainingDiverged as error:
                self._save()
                raise TrainingDiverged(
                    f"{error}. To start a new run from the weights, set run.weights={self.folder / 'last.safetensors'}"
                ) from None
            self.step += 1
            self.step_in_epoch += 1
            self.means.add(values)
            before, ended = ended, time.perf_counter()
            self.clock.add(share.size, ended - before, came - asked)
            last = self.step_in_epoch == self.batches.steps
            if last or self.step % self.config.output.log_every == 0:
                self._log(learning_rate)
            self.display.update(self.step, self.epoch, values, self.clock, self.system.skipped)
            self.stopping = self.processes.any(self.stop.requested)
            if self._to_stop(max_steps):
                return
            if not last and self.step % self.config.output.checkpoint_every == 0:
                self._save()
            asked = time.perf_counter()

    def _train_batches(self) -> Iterator[dict[str, Any]]:
        if hasattr(self.train_set, "set_epoch"):
            self.train_set.set_epoch(self.epoch)
        self.batches.set_position(self.epoch, self.step_in_epoch)
        return self._load_items(self.train_set, batch_sampler=self.batches)

    def _load_items(self, dataset: Dataset, **arguments: Any) -> Iterator[dict[str, Any]]:
        seed = self.config.run.seed + self.epoch
        return batches(dataset, self.device, workers=self.config.data.workers, seed=seed, **arguments)

    def _end_epoch(self) -> None:
        """Validate where it is due, move the schedule on, and write the state of the next epoch's beginning."""
        due = self.config.validation.every and (
            (self.epoch + 1) % self.config.validation.every == 0 or self.epoch + 1 == self.config.run.epochs
        )
        if due and self.validation_set is not None:
            scores = self._validate()
            if scores is None:
                return
            self.scores = scores
        else:
            due = False
        self.system.end_epoch()
        self.epoch += 1
        self.step_in_epoch = 0
        if due:
            improved = self.best is None or self.scores["psnr"] > self.best["psnr"]
            if improved:
                self.best = {"epoch": self.epoch, **self.scores}
                self._save("best")
            if self.processes.first:
                row = {"epoch": self.epoch, "step": self.step, **self.scores}
                self.validation_log.write(row)
                self.curves.write("validation", row)
            self.display.say(
                f"epoch {self.epoch}: PSNR {self.scores['psnr']:.2f} dB, SSIM {self.scores['ssim']:.4f}"
                + (" (best)" if improved else "")
            )
        keep_every = self.config.output.keep_every
        if keep_every is not None and self.epoch % keep_every == 0:
            self._save(f"epoch-{self.epoch:05d}")
        self._save()

    def _validate(self) -> dict[str, float] | None:
        """Mean scores of the validation images, shared among the processes; None when a stop was asked for."""
        protocol = PROTOCOLS[self.config.validation.protocol]
        images = min(len(self.validation_set), self.config.validation.images or len(self.validation_set))
        mine = range(self.processes.rank, images, self.processes.size)
        psnr, ssim = [], []
        for item in self._load_items(self.validation_set, batch_size=None, sampler=mine):
            if self.stop.requested:
                break
            restored = self.system.restore(protocol.cut(item["hazy"])[None])[0].cpu()
            scores = score(restored, protocol.cut(item["clear"]), protocol.name)
            psnr.append(scores.psnr)
            ssim.append(scores.ssim)
        self.stopping = self.processes.any(self.stop.requested)
        if self.stopping:
            return None
        psnr_sum, ssim_sum = self.processes.sum([math.fsum(psnr), math.fsum(ssim)])
        return {"psnr": psnr_sum / images, "ssim": ssim_sum / images, "images": images}

    def _log(self, learning_rate: float) -> None:
        row = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "learning_rate": learning_rate,
            **self.means.take(),
            "skipped": self.system.skipped,
            **self.clock.lap(),
        }
        if self.processes.first:
            self.log.write(row)
            self.curves.write("train", row)

    def _save(self, name: str = "last", keep: bool = True) -> None:
        """Write the state, and the weights with their card where they are the last or the best.

        Args:
            name: of the files.
            keep: the last state becomes the previous one.
        """
        random_states = self.processes.gather(random_state(self.device))
        if name == "last":
            self.saved = (self.epoch, self.step_in_epoch)
            self.saved_step = self.step
        if not self.processes.first:
            return
        previous = self.folder / "previous.pt" if name == "last" and keep else None
        save_checkpoint(self.folder / f"{name}.pt", self._state(random_states), keep_as=previous)
        if name in ("last", "best"):
            self._save_weights(name)

    def _save_weights(self, name: str) -> None:
        if self.processes.first:
            save_weights(self.folder / f"{name}.safetensors", self.system.network, self._weights_card())

    def _state(self, random_states: list[dict[str, Any]]) -> dict[str, Any]:
        network = self.system.network
        return {
            "config": self.config.model_dump(mode="json"),
            "versions": versions(),
            "position": {
                "epoch": self.epoch,
                "step_in_epoch": self.step_in_epoch,
                "step": self.step,
                "samples": self.batches.samples,
            },
            "system": self.system.state_dict(),
            "random": random_states,
            "means": self.means.state_dict(),
            "scores": self.scores,
            "best": self.best,
            "card": self.card,
            "weights": {
                "state": dict(network.state_dict()),
                **describe(network),
                **self._weights_card(),
            },
        }

    def _weights_card(self) -> dict[str, Any]:
        root = self.config.data.root
        card = {
            "data": None if root is None else root.name,
            "training": {
                "preset": self.config.preset,
                "epochs": self.epoch,
                "steps": self.step,
                "averaged": self.system.average is not None,
            },
        }
        if self.scores is not None and math.isfinite(self.scores["psnr"]):  # JSON has no infinity
            card["scores"] = {self.config.validation.protocol: self.scores}
        return card | self.card

    def _load(self, checkpoint: Mapping[str, Any]) -> None:
        position = checkpoint["position"]
        if position["samples"] != self.batches.samples:
            raise ConfigError(
                f"the training set has {self.batches.samples} samples, the run to resume was trained on "
                f"{position['samples']}: their order would be another"
            )
        self.system.load_state_dict(checkpoint["system"])
        self.epoch = position["epoch"]
        self.step_in_epoch = position["step_in_epoch"]
        self.step = position["step"]
        self.means.load_state_dict(checkpoint["means"])
        self.scores = checkpoint["scores"]
        self.best = checkpoint["best"]
        self.saved = (self.epoch, self.step_in_epoch)
        self.saved_step = self.step
        if self.processes.rank < len(checkpoint["random"]):
            set_random_state(checkpoint["random"][self.processes.rank], self.device)

    def _check_data(self) -> None:
        """One sample of either set, so that what does not fit is found before the first step."""
        names = self.system.batch_names
        patch = self.config.data.patch
        _check_item("the training set", self.train_set, names, patch)
        if self.validation_set is not None and self.config.validation.every:
            item = _check_item("the validation set", self.validation_set, ("hazy", "clear"), None)
            score(item["clear"], item["clear"], self.config.validation.protocol)  # raises where it is too small

    def _prepare_folder(self, overwrite: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self.folder.glob(".*.tmp"):
            unfinished.unlink()  # of a run that was killed while it wrote
        if overwrite:
            for pattern in OWN_FILES:
                for file in self.folder.glob(pattern):
                    file.unlink()
        self.log.keep(lambda row: int(row["step"]) <= self.step)
        self.validation_log.keep(lambda row: int(row["epoch"]) <= self.epoch)
        with atomic_write(self.folder / "config.yaml") as stream:
            stream.write(to_yaml(self.config).encode())
        file = self.folder / "versions.json"
        starts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        starts.append({"started": started, "step": self.step, "processes": self.processes.size, **versions()})
        with atomic_write(file) as stream:
            stream.write(json.dumps(starts, indent=2).encode())


class _StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a wish; the second interrupts at once, unless ``patient``.

    torchrun passes on the Ctrl-C that the terminal has sent to every process, so there it comes twice.
    """

    def __init__(self, patient: bool) -> None:
        self.patient = patient
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and not self.patient:
            raise KeyboardInterrupt
        self.requested = True


def _checkpoint_to_resume(folder: Path, resume: bool | str | PathLike[str], overwrite: bool) -> dict[str, Any] | None:
    if resume is not False and overwrite:
        raise RunFolderError("overwrite: a run is either resumed or overwritten, not both")
    occupied = folder.exists() and (not folder.is_dir() or any(folder.glob("*")))
    if resume is False:
        if occupied and not overwrite:
            raise RunFolderError(
                f"{folder}: exists and is not empty; resume the run it holds, overwrite it, or choose another folder"
            )
        return None
    if resume is True:
        if not any(folder.glob("*.pt")):
            killed = "; it was stopped before its first one: start it again and overwrite it"
            why = "no checkpoint" + (killed if (folder / "config.yaml").is_file() else "")
            raise RunFolderError(f"{folder}: there is no run to resume ({why})")
        return load_checkpoint(folder / "last.pt")
    path = Path(resume)
    if occupied and path.resolve().parent != folder.resolve():
        raise RunFolderError(f"{folder}: holds another run than the checkpoint {path}; choose an empty folder")
    return load_checkpoint(path)


def _resumed_config(
    config: Configuration | None, changes: Mapping[str, Any], checkpoint: Mapping[str, Any] | None
) -> Configuration:
    if changes and (checkpoint is None or config is not None):
        raise ConfigError("changes: they are made to the configuration of a resumed run, without a config beside them")
    if checkpoint is None:
        if config is None:
            raise ConfigError("config: only a resumed run can do without")
        return config
    before = load_config(checkpoint["config"])
    if config is None:
        config = load_config(merge(checkpoint["config"], changes))
    old, new = (flatten(values.model_dump(mode="json")) for values in (before, config))
    free = list(FREE_FIELDS)
    if before.schedule.kind != "cosine":
        free.append("run.epochs")
    if "none" not in (old.get("data.depth"), new.get("data.depth")):
        free.append("data.depth")
    changed = [
        f"{name}: {old.get(name)!r} in the checkpoint, {new.get(name)!r} now"
        for name in {**old, **new}
        if old.get(name) != new.get(name) and not name.startswith(tuple(free))
    ]
    if changed:
        raise ConfigError("a resumed run cannot change\n" + "\n".join(changed))
    return config


def _device(name: str, processes: Processes) -> torch.device:
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and processes.size > 1:
        device = torch.device("cuda", processes.local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError(f"run.device: got {name}, but PyTorch sees {found} GPUs; `mitnet-fast doctor` tells why")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _open_datasets(config: Configuration) -> tuple[Dataset, Dataset | None]:
    data = config.data
    if data.root is None:
        raise ConfigError("data.root: not set; it is the folder of the training set (data.root=DIR)")
    depth = getattr(data, "depth", "none")
    if depth is None:
        raise ConfigError(
            "data.depth: not set; it is the folder of the clear images' depth maps, named like them, "
            "or none to train without the depth terms"
        )
    train_set = PairedImages(
        data.root,
        split="train",
        layout=data.layout,
        patch=data.patch,
        augment=None if data.augment == "none" else data.augment,
        depth=None if depth == "none" else depth,
        seed=config.run.seed,
        repeat=data.repeat,
        on_device=True,
    )
    if not config.validation.every:
        return train_set, None
    advice = "name another folder (data.validation_root=DIR), or do without (validation.every=0)"
    try:
        validation_set = PairedImages(data.validation_root or data.root, split="test", layout=data.layout)
    except DataError as error:
        raise ConfigError(f"validation: {error}\n{advice}") from error
    if validation_set.root == train_set.root and not {*validation_set.pairs}.isdisjoint(train_set.pairs):
        raise ConfigError(f"validation: {train_set.root} has no test split, its images are those of training; {advice}")
    return train_set, validation_set


def _check_item(where: str, dataset: Dataset, names: tuple[str, ...], patch: int | None) -> Mapping[str, Any]:
    if not isinstance(dataset, Sized) or len(dataset) == 0:
        raise ConfigError(f"{where} is empty")
    item = dataset[0]
    for name in names:
        if name not in item:
            hint = " (data.depth=none trains without the depth terms)" if name == "depth" else ""
            raise ConfigError(f"{where}: an item has {', '.join(item)}, but no {name}{hint}")
        value, channels = item[name], 1 if name == "depth" else 3
        fits = isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.uint8) and value.dim() == 3
        sides = tuple(value.shape[1:]) if fits else ()
        if not fits or value.shape[0] != channels or (patch is not None and sides != (patch, patch)):
            found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            size = "H, W" if patch is None else f"{patch}, {patch}"
            raise ConfigError(f"{where}: {name} of an item is {found}, expected float32 [{channels}, {size}]")
        if value.is_floating_point() and not ((value >= 0) & (value <= 1)).all():
            raise ConfigError(
                f"{where}: {name} of its first item goes from {value.min():g} to {value.max():g}, expected [0, 1]"
            )
    return item


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
