# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Training on packed batches with transformers' Trainer.

An item of the DataLoader is an optimizer step of one rank: a list of packs. `PackedBatches` already divides a step
among the ranks and goes through all epochs, so for Trainer a run is one epoch of items of batch size 1 without gradient
accumulation, and the number of the step is all the state that the data has.
"""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import TrainOutput

from ..devices import choose_device, computes_natively
from .collate import Pack, normalize_tiles
from .components import check_trainable, checkpointed_components, components_of, parameter_groups, tied_names
from .corpus import Skipped
from .log import (
    LOG,
    SKIPPED,
    Progress,
    StepTotals,
    append_lines,
    device_peak,
    flatten_figures,
    keep_until,
    peak_bytes,
    step_figures,
)
from .loss import answer_weights
from .objectives import objective_of
from .packing import PackedBatches
from .recipe import ENGINES


if TYPE_CHECKING:
    from .recipe import Recipe

DDP_TYPES = [getattr(DistributedType, name) for name in dir(DistributedType) if name.startswith("MULTI_")]
# Numbers of a step that are summed over the ranks, in this order.
COUNTS = ("samples", "tokens", "squared_tokens", "answer_tokens", "tiles", "skipped")


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and its samples."""


# Engines


def resolve_engine(engine: str, processes: int | None = None) -> str:
    """
    Return the engine of a recipe; of "auto" single for one process, else zero3, the engine of the paper.

    Args:
        processes: Default: as the launcher set WORLD_SIZE.

    Raises:
        ValueError: The engine is unknown, or not installed.
    """
    if engine == "auto":
        processes = int(os.environ.get("WORLD_SIZE", 1)) if processes is None else processes
        engine = "single" if processes == 1 else "zero3"
    if engine not in ENGINES:
        raise ValueError(f"engine: expected auto or one of {', '.join(ENGINES)}, got {engine!r}")
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        raise ValueError(f"engine: {engine} needs deepspeed: pip install deepspeed, or set engine=fsdp2")
    return engine


def training_arguments(
    recipe: "Recipe", output: Path, steps: int, model: PreTrainedModel, **options: Any
) -> TrainingArguments:
    """
    Return the TrainingArguments of a recipe.

    Args:
        output: Folder of the run.
        steps: Steps of the data; the run ends earlier if the recipe has a smaller max_steps.
        model: Not wrapped; FSDP2 shards the layers that it names.
        options: Replace arguments.
    """
    device, engine = choose_device(), resolve_engine(recipe.engine)
    _start_processes(device, recipe.timeout_minutes)
    max_steps = min(steps, recipe.max_steps or steps)
    arguments = {
        "output_dir": str(output),
        "max_steps": max_steps,
        "per_device_train_batch_size": 1,
        "learning_rate": 1.0,  # unused: every parameter group has its own
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.adam_beta1,
        "adam_beta2": recipe.adam_beta2,
        "adam_epsilon": recipe.adam_epsilon,
        "max_grad_norm": recipe.max_grad_norm,
        "warmup_steps": math.ceil(recipe.warmup_ratio * max_steps),
        "optim": "adamw_torch" if device.type == "cpu" or engine.startswith("zero") else "adamw_torch_fused",
        "bf16": _uses_bfloat16(recipe.precision, device),
        "use_cpu": device.type == "cpu",
        "seed": recipe.seed,
        "save_steps": recipe.save_steps,
        "save_total_limit": recipe.save_total_limit,
        "logging_steps": recipe.logging_steps,
        "logging_nan_inf_filter": False,
        "log_level_replica": "error",  # the first rank prints the warnings of transformers and DeepSpeed
        "report_to": list(recipe.report_to),
        "dataloader_num_workers": recipe.workers,
        "ignore_data_skip": True,  # the sampler starts at the step
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "ddp_timeout": math.ceil(60 * recipe.timeout_minutes),
        "disable_tqdm": not sys.stderr.isatty(),
        **_schedule(recipe),
        **_engine_arguments(engine, recipe, model),
    }
    return TrainingArguments(**(arguments | options))


def _start_processes(device: torch.device, timeout_minutes: float) -> None:
    """Start the process group of CPUs, to which TrainingArguments does not pass its ddp_timeout."""
    if device.type == "cpu" and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(minutes=timeout_minutes))


def _uses_bfloat16(precision: str, device: torch.device) -> bool:
    return precision == "bfloat16" or (precision == "auto" and computes_natively(torch.bfloat16, device))


def _schedule(recipe: "Recipe") -> dict[str, Any]:
    name, least = recipe.lr_scheduler_type, recipe.min_learning_rate_ratio
    if not least:
        return {"lr_scheduler_type": name}
    if name != "cosine":
        raise ValueError(f"min_learning_rate_ratio: expected 0 with lr_scheduler_type {name}, got {least}: use cosine")
    return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": least}}


def _engine_arguments(engine: str, recipe: "Recipe", model: PreTrainedModel) -> dict[str, Any]:
    if engine.startswith("zero"):
        zero = {"stage": int(engine[-1])}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": recipe.max_grad_norm,
            "bf16": {"enabled": "auto"},
            "data_types": {"grad_accum_dtype": "fp32"},  # over the packs of a step
            "zero_optimization": zero,
        }
        return {"deepspeed": config}
    if engine == "fsdp2":
        return _fsdp_arguments(model)
    return {}


def _fsdp_arguments(model: PreTrainedModel) -> dict[str, Any]:
    parts = (getattr(model, attribute) for attribute in components_of(model).values())
    present = {type(module).__name__ for module in model.modules()}
    layers = sorted({name for part in parts for name in getattr(part, "_no_split_modules", None) or ()} & present)
    config = {"transformer_layer_cls_to_wrap": layers, "state_dict_type": "SHARDED_STATE_DICT"}
    if int(transformers.__version__.split(".")[0]) < 5:
        return {"fsdp": "full_shard auto_wrap", "fsdp_config": {**config, "fsdp_version": 2}}
    return {"fsdp": True, "fsdp_config": {**config, "version": 2}}


def check_engine(trainer: Trainer, engine: str) -> None:
    """
    Check that the engine of the recipe is the one that runs: several launchers fall back to another in silence.

    Raises:
        TrainingError: It is another.
    """
    accelerator = trainer.accelerator
    running = accelerator.distributed_type
    stage = accelerator.state.deepspeed_plugin.zero_stage if running == DistributedType.DEEPSPEED else None
    is_fsdp1 = running == DistributedType.FSDP and not accelerator.is_fsdp2
    if running not in _distributed_types(engine) or is_fsdp1 or (stage and stage != int(engine[-1])):
        got = f"ZeRO-{stage}" if stage else "FSDP 1" if is_fsdp1 else running.value
        fix = "start several processes with torchrun, and set no engine in the launcher"
        if engine == "fsdp2" and accelerator.device.type == "cpu":
            fix = "accelerate runs FSDP2 on GPUs only: use zero3 or ddp on CPUs"
        processes = accelerator.num_processes
        raise TrainingError(f"engine: expected {engine}, but accelerate runs {got} on {processes} process(es): {fix}")


def _distributed_types(engine: str) -> list[DistributedType]:
    if engine == "ddp":
        return DDP_TYPES
    if engine.startswith("zero"):
        return [DistributedType.DEEPSPEED]
    return [DistributedType.FSDP if engine == "fsdp2" else DistributedType.NO]


# Data


class StepSampler(Sampler[int]):
    """The numbers of the steps, from the current step of a Trainer on."""

    def __init__(self, trainer: Trainer, steps: int):
        self.trainer, self.steps = trainer, steps

    def __len__(self) -> int:
        """Return the steps of the whole run, those done before a resume included."""
        return self.steps

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.trainer.state.global_step, self.steps))


def _ignore_sigterm(worker: int) -> None:
    """Leave SIGTERM, which launchers send to all processes of a run, to the rank: it goes on until it has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class RunState(TrainerCallback):
    """Prepares log.jsonl, skipped.jsonl, the progress and ZeRO's weights at the start; counts epochs of the corpus."""

    def __init__(self, trainer: "SAILVLTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            for name in (LOG, SKIPPED):
                keep_until(self.trainer.output / name, state.global_step)
            self.trainer.progress = Progress(state.max_steps, state.global_step, not args.disable_tqdm)
        if self.trainer.read_weight and not state.global_step:
            _set_master_weights(self.trainer.model, self.trainer.read_weight)
        self.trainer._step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        batches = self.trainer.batches
        state.epoch = min(state.global_step * batches.samples_per_step, batches.num_samples) / len(batches.corpus)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.progress is not None:
            self.trainer.progress.close()


def _set_master_weights(model: PreTrainedModel, read_weight: Callable[[str], torch.Tensor]) -> None:
    """Set the float32 weights that ZeRO updates: it made them from weights rounded to bfloat16."""
    from deepspeed.utils import safe_set_full_fp32_param  # optional, and slow to import

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            safe_set_full_fp32_param(parameter, read_weight(name).float())


# Trainer


class SAILVLTrainer(Trainer):
    """
    transformers' Trainer over packed batches: the loss is normalised over the step, whatever its packs and ranks.

    Args:
        model: A SAIL-VL or NextPatchModel in float32, after `set_trainable`; it decides on the objective.
        recipe: Of the stage.
        batches: The packs of this rank.
        output: Folder of the run; gets log.jsonl and skipped.jsonl.
        args: Default: `training_arguments` of the recipe.
        read_weight: Name of a trained parameter -> its float32 value, for a run that starts under ZeRO with bfloat16;
            called on all ranks.
        kwargs: As in Trainer.

    Raises:
        ValueError: The recipe, the batches and the processes do not fit each other.
        TrainingError: Another engine runs than the recipe says; a loss or gradient is not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: "Recipe",
        batches: PackedBatches,
        output: str | Path,
        args: TrainingArguments | None = None,
        read_weight: Callable[[str], torch.Tensor] | None = None,
        **kwargs: Any,
    ):
        self.recipe, self.batches, self.output = recipe, batches, Path(output)
        args = args or training_arguments(recipe, self.output, len(batches), model)
        self.objective = objective_of(model)
        self.flops = self.objective.flops(checkpointed_components(recipe))  # before it is sharded
        super().__init__(model, args, train_dataset=batches, **kwargs)
        model._keys_to_ignore_on_save = tied_names(model)  # else a resume warns that a checkpoint lacks them
        self._check_ranks(batches)
        self._reduce_in_float32()
        self.read_weight = read_weight if self.is_deepspeed_enabled else None
        self.objective.prepare(self.accelerator.num_processes)
        peak = device_peak(recipe.peak_tflops, self.args.device, self.args.bf16)
        self.peak_flops = peak and peak * self.accelerator.num_processes
        self.progress: Progress | None = None
        self._step: StepTotals | None = None  # the current step, and those since the last report
        self._unreported: StepTotals | None = None
        self._answer_kinds = np.zeros(0, int)  # of the answer tokens of this rank
        self._loss, self._step_started, self._recorded_step = math.nan, time.perf_counter(), 0
        self._unreadable: set[tuple[Any, ...]] = set()  # sources, files and rows
        for callback in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(RunState(self))

    def _check_ranks(self, batches: PackedBatches) -> None:
        processes = self.accelerator.num_processes
        engine = resolve_engine(self.recipe.engine, processes)
        check_engine(self, engine)
        expected = (processes, self.accelerator.process_index)
        if (batches.ranks, batches.rank) != expected:
            raise ValueError(
                f"batches: expected ranks={expected[0]}, rank={expected[1]}, got {batches.ranks}, {batches.rank}"
            )
        trains_rows = any(hasattr(parameter, "trained_rows") for parameter in self.model.parameters())
        if engine == "fsdp2" and trains_rows:
            raise ValueError("train_added_tokens: not supported by FSDP2, whose gradients have no rows: use zero3")

    def _reduce_in_float32(self) -> None:
        """Let FSDP2 reduce gradients in float32: they are added over the packs of a step."""
        if self.is_fsdp_enabled and (policy := self.accelerator.state.fsdp_plugin.mixed_precision_policy):
            policy = replace(policy, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in Trainer; on a CPU, unless the recipe chooses, the language model attends sample by sample meanwhile."""
        chooses = self.recipe.attn_implementation is None and self.args.device.type == "cpu"  # not measured elsewhere
        with self.objective.cpu_attention() if chooses else contextlib.nullcontext():
            return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Not prepared by accelerate: the batches are those of this rank, and packs go to the device one by one."""
        return DataLoader(
            self.batches,
            batch_size=None,
            sampler=StepSampler(self, self.args.max_steps),
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=_ignore_sigterm,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return self.batches.samples_per_step

    def floating_point_ops(self, inputs: list[Pack]) -> int:
        """Not counted: transformers' formula has one model for text and images."""
        return 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            check_trainable(model, self.recipe)
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer(parameter_groups(model, self.recipe), **options)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Pack]], num_batches: int, device: torch.device
    ) -> tuple[list[list[Pack]], float | None]:
        """Return the packs of a step and the sum of the weights of its answer tokens on all ranks."""
        started = time.perf_counter()
        packs = next(epoch_iterator, None)
        waited = time.perf_counter() - started
        if packs is None:
            return [], None
        self._answer_kinds = self._kinds_of_answers(packs)
        weight, self._step = self._count(packs)
        self._step.wait_seconds = waited
        self._record_skipped(packs)
        if not self._step.counts["answer_tokens"]:
            raise TrainingError(f"{self._describe_step()}: expected at least one answer token, got none")
        return [packs], weight

    def _kinds_of_answers(self, packs: list[Pack]) -> np.ndarray:
        """Return the number of the kind of every answer token."""
        return np.concatenate([np.repeat(self._kinds_of(pack), pack.answers) for pack in packs])

    def _kinds_of(self, pack: Pack) -> np.ndarray:
        """Return the number of the kind of every conversation of a pack."""
        corpus = self.batches.corpus
        of_samples = np.repeat(corpus.kinds[np.array(pack.samples, int)], np.array(pack.conversations, int))
        names = zip(pack.kinds, of_samples, strict=True)
        return np.array([corpus.kind_names.index(name) if name else kind for name, kind in names], int)

    def _count(self, packs: list[Pack]) -> tuple[float, StepTotals]:
        """Return the sum of the weights of all answer tokens, and the counts, of all ranks."""
        reduction, tiles = self.recipe.loss_reduction, (pack.inputs.get("pixel_values", ()) for pack in packs)
        own = [
            sum(float(answer_weights(pack, reduction).sum()) for pack in packs),
            sum(len(pack.samples) for pack in packs),
            sum(sum(pack.lengths) for pack in packs),
            sum(segment.squared_tokens for pack in packs for segment in pack.segments),
            sum(pack.num_labels for pack in packs),
            sum(map(len, tiles)),
            sum(len(pack.skipped) for pack in packs),
            *np.bincount(self._answer_kinds, minlength=len(self.batches.corpus.kind_names)).tolist(),
        ]
        weight, *totals = self._sum_over_ranks(own)
        counts, by_kind = totals[: len(COUNTS)], totals[len(COUNTS) :]
        return weight, StepTotals(dict(zip(COUNTS, map(int, counts), strict=True)), np.array(by_kind))

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        if self.accelerator.num_processes == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        return self.accelerator.reduce(tensor, "sum").tolist()

    def _gather_over_ranks(self, values: list[float]) -> np.ndarray:
        """Return the values of all ranks (ranks, values)."""
        if self.accelerator.num_processes == 1:
            return np.array([values])
        tensor = torch.tensor([values], dtype=torch.float64, device=self.args.device)
        return self.accelerator.gather(tensor).cpu().numpy()

    def _record_skipped(self, packs: list[Pack]) -> None:
        if not self._step.counts["skipped"]:
            return
        corpus, step = self.batches.corpus, self.state.global_step + 1
        entries = [corpus.skip(index, reason).to_dict() for pack in packs for index, reason in pack.skipped]
        entries = gather_object([{"step": step, **entry} for entry in entries])
        if self.is_world_process_zero():
            append_lines(self.output / SKIPPED, entries)
        self._check_skipped(entries)

    def _check_skipped(self, entries: list[dict[str, Any]]) -> None:
        """Stop if more samples could not be read since the start than `max_bad_fraction` of an epoch."""
        keys = ("source", "path", "line", "index")
        self._unreadable.update(tuple(map(entry.get, keys)) for entry in entries)
        corpus, last = self.batches.corpus, entries[-1]
        location = {name: last[name] for name in ("line", "index") if name in last}
        last = Skipped(last["source"], last["path"], location, last["reason"])
        if len(self._unreadable) > corpus.max_bad_fraction * len(corpus):
            raise TrainingError(
                f"{len(self._unreadable)} samples could not be read, more than max_bad_fraction "
                f"{corpus.max_bad_fraction:g} of {len(corpus)}: restore their files, or raise max_bad_fraction in "
                f"corpus.yaml; {self.output / SKIPPED} lists them, the last: {last}"
            )

    def training_step(
        self, model: nn.Module, inputs: list[Pack], num_items_in_batch: float | None = None
    ) -> torch.Tensor:
        """Run forward and backward of all packs of a step; return this rank's share of the loss times the ranks."""
        model.train()
        # DDP, FSDP and DeepSpeed average gradients over the ranks
        scale = self.accelerator.num_processes / num_items_in_batch
        total, losses = torch.zeros((), device=self.args.device), []
        for position, pack in enumerate(inputs):
            is_last = position == len(inputs) - 1
            with self._synchronize_gradients(model, is_last):
                loss, of_answers = self._compute_pack_loss(model, pack)
                loss = scale * loss
                options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
                self.accelerator.backward(loss, **options)
            total += loss.detach()
            losses.append(of_answers)
        self._sum_losses(total, losses, inputs)
        return total

    @contextlib.contextmanager
    def _synchronize_gradients(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        """
        DDP reduces gradients after the last pack of a step; ZeRO and FSDP2 after every pack.

        If they waited, every rank would hold all gradients of the model until the end of the step.
        """
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        waits = not is_last and self.accelerator.distributed_type in DDP_TYPES
        with self.accelerator.no_sync(model) if waits else contextlib.nullcontext():
            yield

    def _compute_pack_loss(self, model: nn.Module, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        weights = answer_weights(pack, self.recipe.loss_reduction).to(self.args.device, torch.float32)
        inputs = pack.to(self.args.device, non_blocking=True).inputs
        tiles = inputs.get("pixel_values")
        if tiles is not None and tiles.dtype == torch.uint8:
            inputs["pixel_values"] = normalize_tiles(tiles, self.batches.corpus.processor.image_processor)
        with self.compute_loss_context_manager():
            return self.objective.loss(model, inputs, pack.segments, weights)

    def _sum_losses(self, total: torch.Tensor, losses: list[torch.Tensor], packs: list[Pack]) -> None:
        """
        Compute the loss of the step, in all and by kind; all ranks stop together if it is not finite.

        With them come the longest wait and the highest memory: one wait for the device, one exchange of the ranks.
        """
        step, (own, *of_answers) = self._step, torch.cat([total[None], *losses]).cpu().double().numpy()
        by_kind = np.bincount(self._answer_kinds, of_answers, len(step.answers_by_kind))
        ranks = self._gather_over_ranks([own, step.wait_seconds, peak_bytes(self.args.device), *by_kind])
        self._loss = float(ranks[:, 0].sum()) / self.accelerator.num_processes
        step.wait_seconds, step.memory = map(float, ranks[:, 1:3].max(0))
        step.losses_by_kind = ranks[:, 3:].sum(0)
        if not math.isfinite(self._loss):
            pairs = zip(packs, losses, strict=True)
            broken = [index for pack, own in pairs if not own.isfinite().all() for index in pack.samples]
            where = self._describe_step(samples=sorted(gather_object(broken)))
            raise TrainingError(f"{where}: the loss is {self._loss}: lower the learning rate, or look at these samples")

    def _describe_step(self, step: int | None = None, samples: Sequence[int] = ()) -> str:
        """Return the number of a step and its samples, or some of them, as their files name them."""
        step = self.state.global_step if step is None else step
        indices = samples or self.batches.samples(step)
        names = [" ".join(map(str, self.batches.corpus.locate(int(index)))) for index in indices]
        return f"step {step + 1}, samples {', '.join(names)}"

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Write log.jsonl after every step, and stop before a broken model is saved."""
        if self.state.global_step > self._recorded_step:
            self._recorded_step = self.state.global_step
            self._record_step(grad_norm, kwargs.get("learning_rate"))
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _record_step(self, grad_norm: Any, learning_rate: float | None) -> None:
        norm, now = None if grad_norm is None else float(grad_norm), time.perf_counter()
        if norm is not None and not math.isfinite(norm):
            name = self._describe_step(self.state.global_step - 1)
            raise TrainingError(
                f"{name}: the norm of the gradients is {norm}: lower the learning rate, or look at these samples"
            )
        self._step.seconds, self._step_started = now - self._step_started, now
        if self.is_world_process_zero():
            self._report_step({"learning_rate": learning_rate, "grad_norm": norm})

    def _report_step(self, optimizer: dict[str, float | None]) -> None:
        """Write the line of a step to log.jsonl and show the progress."""
        step, number = self._step, self.state.global_step
        packing = self.batches.statistics([number - 1])
        step.fill, step.balance = packing["fill"], packing["balance"]
        step.memory = max(step.memory, peak_bytes(self.args.device))  # of this rank also in the optimizer
        entry = {"step": number, "epoch": self.state.epoch, "loss": self._loss}
        entry |= {name: step.counts[name] for name in COUNTS if name != "squared_tokens"}
        entry |= optimizer | {"seconds": step.seconds, "wait_seconds": step.wait_seconds} | self._figures(step)
        append_lines(self.output / LOG, [entry])
        self._unreported = step if self._unreported is None else self._unreported + step
        self.progress.update(number, self._loss, entry["samples_per_second"])

    def _figures(self, totals: StepTotals) -> dict[str, Any]:
        return step_figures(totals, self.batches.corpus.kind_names, self.flops, self.peak_flops)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report to `report_to` also the figures of log.jsonl; the history that checkpoints keep stays as it is."""
        if self._unreported is None or "loss" not in logs:
            super().log(logs, start_time)
            return
        figures, self._unreported = flatten_figures(self._figures(self._unreported)), None
        super().log({**logs, **figures}, start_time)
        history = self.state.log_history
        history[-1] = {name: value for name, value in history[-1].items() if name not in figures}
