"""The loop of `mirage train`: on accelerate, with atomic checkpoints and exact resumption.

    metrics.jsonl          one line per step: loss and its parts, learning rate, gradient norm, seconds
    config.json            what the run was started with
    summary.json           figures of the whole run, when it has ended: see :func:`summarise`
    checkpoints/00000500/  what was trained, optimizer, schedule: see :mod:`mirage.training.checkpoints`
    vae/ transformer/ memory_adapter/ latent_depth/ lora.safetensors    what the stage has trained, when it has ended
    tensorboard/

A run that is killed at any moment and started again resumes at its newest checkpoint, and every step after it is what
it would have been: which clips a step sees, and every draw in it, are functions of the seed and the step. One process
at a time (or one launch of several) holds the folder. A run whose files are damaged is refused, and left as it is.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mirage_kernels.io import replace_text

from ..files.checked import DamagedFileError
from ..optional import import_extra
from .batches import DiffusionBatchMaker
from .checkpoints import Checkpoint, list_checkpoints, read_config_digest, read_newest, remove_drafts, save_checkpoint
from .config import TrainConfig
from .data import BatchSampler, ClipDataset, Sample, list_broken
from .models import Models, load_models, mark_trained, save_models, trained
from .objective import DiffusionObjective
from .optimizer import make_optimizer
from .record import CONFIG, METRICS, Metrics, check_config, digest_config, locked, record_config
from .seeds import derive_seed
from .vae_objective import VaeObjective, VideoBatchMaker, measure_latents

CHECKPOINTS, TENSORBOARD, SUMMARY = "checkpoints", "tensorboard", "summary.json"


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    broken: dict[str, str] = field(default_factory=dict)


def train(config: TrainConfig, progress: bool = True) -> dict[str, Any]:
    """Train one stage.

    Args:
        config: see :class:`~mirage.training.config.TrainConfig`.
        progress: show a progress bar.

    Returns:
        steps, seconds, loss (mean of the last tenth of the steps), broken ({clip: reason}), saved (names in `out`).

    Raises:
        FileExistsError: there is a run in `out`, and `resume` is False.
        BlockingIOError: another training runs in `out`.
        DamagedFileError: a file of the run in `out` is not what was written; the message says what can be done.
        OSError, ValueError: naming what cannot be used.
        MissingExtraError: a package of the extra `train` is not installed.
    """
    if config.tensorboard:
        import_extra("tensorboard", "train")
    out = Path(config.out)
    if not config.resume and (out / CONFIG).exists():
        raise FileExistsError(f"{out} holds a run already: resume it, or name another folder")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=str(out),
    )
    with locked(out) if accelerator.is_main_process else nullcontext():
        check_config(config, out, read_config_digest(out / CHECKPOINTS))
        set_seed(config.seed)
        clips = ClipDataset(config.data, config.seed)
        models = load_models(config, accelerator.device)
        run = _Run(config, accelerator, clips, models)
        run.settle()  # only now: what was mistyped may be put right, and what is refused is as it was
        with run.logging(progress) as log:
            run.go(log)
        return run.finish()


class _Run:
    def __init__(self, config: TrainConfig, accelerator: Accelerator, clips: ClipDataset, models: Models) -> None:
        self.config, self.accelerator, self.clips, self.models = config, accelerator, clips, models
        self.out, self.began, self.progress = Path(config.out), time.perf_counter(), Progress()
        self.make: Callable[[list[Sample]], Any]
        mark_trained(config, models)
        objective: nn.Module
        if config.stage == "vae":
            objective, self.make = VaeObjective(config, models), VideoBatchMaker(config, accelerator.device)
        else:
            objective = DiffusionObjective(config, models)
            self.make = DiffusionBatchMaker(config, models, accelerator.device)
        objective.train()
        optimizer = make_optimizer(config, trained(objective).values())
        # Not prepared: accelerate would step it once a process.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(config, step))
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.losses: list[float] = []
        self.metrics: Metrics | None = None  # in the main process
        self._restore()

    # Checkpoints.

    def _trained(self) -> dict[str, Tensor]:
        """Return what is trained of the models; the rest is where it came from."""
        return trained(self.accelerator.unwrap_model(self.objective))

    def _restore(self) -> None:
        """Take up the run at its newest checkpoint. Nothing on disk is changed."""
        folder = self.out / CHECKPOINTS
        checkpoint = read_newest(folder)
        if checkpoint is not None:
            self._load(checkpoint, list_checkpoints(folder)[-1])
        if self.accelerator.is_main_process:
            self.metrics = Metrics(self.out, self.progress.step, checkpoint.metrics if checkpoint else None)

    def _load(self, checkpoint: Checkpoint, path: Path) -> None:
        named = self._trained()
        if {name: value.shape for name, value in checkpoint.trained.items()} != {
            name: value.shape for name, value in named.items()
        }:
            raise ValueError(f"{path}: a checkpoint of other parameters than this run trains")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(checkpoint.trained[name])
        try:
            self.optimizer.load_state_dict(checkpoint.optimizer)
            self.schedule.load_state_dict(checkpoint.schedule)
            if checkpoint.scaler is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(checkpoint.scaler)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise DamagedFileError(f"{path}: the state of optimizer and schedule does not fit ({error})") from error
        self.progress = Progress(checkpoint.step, checkpoint.broken)

    def settle(self) -> None:
        """Write config.json and remove what an earlier process left behind, before the first step."""
        if self.metrics is not None:
            record_config(self.config, self.out)
            (self.out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            remove_drafts(self.out / CHECKPOINTS)
            self.metrics.open()
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.metrics is not None:
            scaler = self.accelerator.scaler
            checkpoint = Checkpoint(
                step=self.progress.step,
                trained=self._trained(),
                optimizer=self.optimizer.state_dict(),
                schedule=self.schedule.state_dict(),
                scaler=None if scaler is None else scaler.state_dict(),
                broken=self.progress.broken,
                metrics=self.metrics.position(),
                config=digest_config(self.config),
            )
            save_checkpoint(self.out / CHECKPOINTS, checkpoint, self.config.keep)
        self.accelerator.wait_for_everyone()

    # Steps.

    def logging(self, progress: bool) -> Any:
        return _Log(self.accelerator, self.config, self.metrics, self.progress.step, progress)

    def _batches(self) -> Iterator[list[Sample]]:
        config, accelerator = self.config, self.accelerator
        passes = config.gradient_accumulation
        sampler = BatchSampler(
            self.progress.step * passes,
            config.steps * passes,
            config.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
        )
        return iter(
            DataLoader(
                self.clips,
                batch_sampler=sampler,  # type: ignore[arg-type]  # any iterable of lists will do
                collate_fn=list,
                num_workers=config.data.workers,
            )
        )

    def go(self, log: _Log) -> None:
        """Take the steps that are left."""
        config, accelerator = self.config, self.accelerator
        batches = self._batches()
        while self.progress.step < config.steps:
            began, norm = time.perf_counter(), 0.0
            parts: list[dict[str, Tensor]] = []
            for _ in range(config.gradient_accumulation):
                samples = next(batches)
                self._count_broken(samples, log)
                # The models' own draws, dropout, are this step's as well.
                torch.manual_seed(derive_seed(config.seed, "step", samples[0].number))
                batch = self.make(samples)
                with accelerator.accumulate(self.objective):
                    losses = self.objective(batch)
                    accelerator.backward(losses["loss"])
                    if accelerator.sync_gradients:
                        norm = float(accelerator.clip_grad_norm_(self._parameters(), config.max_grad_norm))
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                parts.append({name: value.detach() for name, value in losses.items()})
            rate = float(self.schedule.get_last_lr()[0])
            if not accelerator.optimizer_step_was_skipped:
                self.schedule.step()
            self.progress.step += 1
            means = self._mean(parts)
            if not math.isfinite(means["loss"]) and config.mixed_precision != "fp16":
                raise ValueError(f"the loss is {means['loss']} at step {self.progress.step}: nothing was saved since")
            self.losses.append(means["loss"])
            log.write(
                self.progress.step,
                means | {"learning_rate": rate, "gradient_norm": norm, "broken": len(self.progress.broken)},
                time.perf_counter() - began,
            )
            if self.progress.step % config.save_every == 0 or self.progress.step == config.steps:
                self._save()

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _mean(self, parts: list[dict[str, Tensor]]) -> dict[str, float]:
        """Average over passes and processes."""
        names = list(parts[0])
        values = torch.stack([torch.stack([part[name].float() for name in names]) for part in parts]).mean(0)
        return dict(zip(names, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def _count_broken(self, samples: list[Sample], log: _Log) -> None:
        for sample in samples:
            for name, reason in sample.broken.items():
                if name not in self.progress.broken:
                    self.progress.broken[name] = reason
                    log.say(f"skipped, {len(self.progress.broken)} so far: {list_broken({name: reason})}")
        if len(self.progress.broken) > self.config.data.max_broken * len(self.clips):
            counted = f"{len(self.progress.broken)} of {len(self.clips)} clips are broken"
            raise ValueError(f"{counted}, more than data.max_broken allows: {list_broken(self.progress.broken)}")

    def finish(self) -> dict[str, Any]:
        config, accelerator = self.config, self.accelerator
        saved: list[str] = []
        if accelerator.is_main_process:
            dtype = getattr(torch, config.save_dtype)
            with torch.no_grad():
                for parameter in self._parameters():  # as it will be read
                    parameter.copy_(parameter.to(dtype))
            if config.stage == "vae" and config.vae.statistics:
                count = min(config.vae.statistics, len(self.clips))
                self.models.vae.eval()
                mean, std = measure_latents(self.models, [self.clips[i].clip for i in range(count)], accelerator.device)
                self.models.vae.register_to_config(latents_mean=mean, latents_std=std)
            saved = save_models(self.out, self.models, config.stage, config.train_adapter, dtype)
            if (self.out / METRICS).stat().st_size:  # it may have been deleted
                replace_text(self.out / SUMMARY, json.dumps(summarise(self.out), indent=2) + "\n")
        accelerator.wait_for_everyone()
        accelerator.end_training()
        tail = self.losses[-max(len(self.losses) // 10, 1) :]
        return {
            "steps": self.progress.step,
            "seconds": time.perf_counter() - self.began,
            "loss": sum(tail) / len(tail) if tail else None,
            "broken": dict(self.progress.broken),
            "saved": saved,
        }


def summarise(out: Path) -> dict[str, Any]:
    """Summarise the lines of a run's metrics.jsonl, those from before a stop included.

    Returns:
        steps; seconds of all steps; loss and, of a VAE, psnr: means of the last tenth of the steps.
    """
    lines = [json.loads(line) for line in (out / METRICS).read_text(encoding="utf-8").splitlines()]
    last = lines[-max(len(lines) // 10, 1) :]
    means = {name: sum(line[name] for line in last) / len(last) for name in ("loss", "psnr") if name in last[0]}
    return {"steps": lines[-1]["step"], "seconds": sum(line["seconds"] for line in lines), **means}


def _rate(config: TrainConfig, step: int) -> float:
    """Return the factor of the learning rate at a step, from 0."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    part = min((step - config.warmup) / max(config.steps - config.warmup, 1), 1.0)
    return {"constant": 1.0, "linear": 1.0 - part, "cosine": 0.5 * (1.0 + math.cos(math.pi * part))}[config.schedule]


class _Log:
    """Write metrics.jsonl, TensorBoard and a progress bar; in the main process alone."""

    def __init__(
        self, accelerator: Accelerator, config: TrainConfig, metrics: Metrics | None, step: int, progress: bool
    ) -> None:
        self.accelerator, self.config, self.metrics = accelerator, config, metrics
        self.is_main = accelerator.is_main_process
        if config.tensorboard:
            accelerator.init_trackers(TENSORBOARD, init_kwargs={TENSORBOARD: {"purge_step": step + 1}})
        tqdm = import_extra("tqdm", "train").tqdm
        self.bar = tqdm(total=config.steps, initial=step, disable=not (progress and self.is_main), desc=config.stage)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.metrics is not None:
            self.metrics.close()

    def write(self, step: int, values: dict[str, float], seconds: float) -> None:
        if self.metrics is not None:
            self.metrics.write({"step": step, **values, "seconds": seconds})
        if self.config.tensorboard:
            self.accelerator.log(values, step=step)
        self.bar.set_postfix(loss=f"{values['loss']:.4g}")
        self.bar.update()

    def say(self, text: str) -> None:
        if self.is_main:
            self.bar.write(text)
