# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
A stage of training, from a recipe to a model: start, stop, resume, hand over.

    run(load_recipe("stage1", ["model=new-vl", "data=corpus.yaml", "output=runs/s1"]))

The same call goes on where a run was interrupted, and does nothing where it is finished.
"""

import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ..configuration_sailvl import SAILVLConfig
from ..convert.storage.checkpoint import Checkpoint, FileCheckpoint
from ..convert.storage.files import first_line
from ..convert.storage.sources import check_separate, find_source
from ..devices import choose_device
from .attention import can_share_prompt
from .check import FIXES, TITLES, load_processor, load_tile_processor
from .checkpoints import (
    RUN,
    STOPPED,
    check_output,
    is_finished,
    keep_newest,
    locked_output,
    mark_complete,
    newest_checkpoint,
    read_json,
    remove_incomplete,
    write_json,
    write_training,
)
from .components import added_token_ids, set_trainable, trainable_table
from .corpus import Corpus
from .estimate import PAPER_STAGES, Plan, make_plan, oom_hint
from .failures import all_ranks_stop, explain_lost_rank, is_lost_connection
from .flops import meta_model
from .handover import build_result, load_for, trained_weights, weight_reader, write_result
from .log import SKIPPED
from .packing import PackedBatches, tile_cost
from .recipe import ENGINES, Recipe
from .record import describe_stage, differences, identity, parent_stages, settings_of
from .tile_batches import TileBatches
from .trainer import SAILVLTrainer, TrainingError, resolve_engine, training_arguments


INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
USED_MEMORY = 0.9  # of a card: the rest is fragmentation and what other libraries take
KIND_TOLERANCE = 0.01

Log = Callable[[str], None]


def run(recipe: Recipe, log: Log = print) -> int:
    """
    Train a stage, or go on with it, and write the model to its output.

    Args:
        recipe: With model, data and output.
        log: Called on the first rank with each message.

    Returns:
        0 if the stage is finished, INTERRUPTED after SIGTERM or `max_hours`, with a checkpoint if there was a step.

    Raises:
        ValueError: Model, data, output, engine or ranks do not fit the recipe, or the output holds another run.
        OSError: A file cannot be read, or a checkpoint not be saved.
        TrainingError: A loss is not finite, the memory is too small, another rank is lost, or another engine runs.
    """
    started, rank, ranks = time.monotonic(), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    log = log if rank == 0 else lambda line: None
    engine = check_environment(recipe, ranks)
    output = Path(recipe.output)
    check_output(output)
    with locked_output(output) if rank == 0 else nullcontext():
        if is_finished(output):
            _check_finished(recipe, output)
            log(f"{output}: this run is finished; nothing to do")
            return 0
        if rank == 0:
            (output / STOPPED).unlink(missing_ok=True)
        with _interruption(recipe.max_hours, started) as interruption:
            try:
                return Stage(recipe, engine, rank, ranks, log).train(interruption)
            except BaseException as error:  # a package may have turned `StoppedAtStart` into an error of its own
                if not interruption.ends_start:
                    raise
                if not all_ranks_stop():
                    raise TrainingError("stopped at the start, since another rank failed") from error
            _record_stop(output, rank, log, interruption.reason)
            return INTERRUPTED


# Before training


def check_environment(recipe: Recipe, ranks: int) -> str:
    """
    Return the engine of a run after a check of what can be checked without files.

    Raises:
        ValueError: A field is missing, or the engine does not fit the ranks.
        ImportError: A package or a compiler that the engine needs is missing.
    """
    for name in ("model", "data", "output"):
        if not getattr(recipe, name):
            raise ValueError(f"{name}: missing; give it as {name}=...")
    engine = resolve_engine(recipe.engine, ranks)
    if ranks > recipe.samples_per_step:
        raise ValueError(f"samples_per_step: expected at least one sample of each of {ranks} ranks")
    if engine == "single" and ranks > 1:
        raise ValueError(f"engine: single is for one process, got {ranks}: choose {', '.join(ENGINES[1:])}")
    if engine != "single" and "RANK" not in os.environ:
        raise ValueError(f"engine: {engine} needs a launcher: torchrun --nproc_per_node N -m sailvit.train ...")
    if engine.startswith("zero"):
        _check_compiler()
    _check_integrations(recipe.report_to)
    return engine


def _is_corrupt_file(error: Exception) -> bool:
    """Return whether torch.load raised an error that is about the content of a file."""
    return isinstance(error, pickle.UnpicklingError) or "PytorchStreamReader" in str(error)


def _check_integrations(names: Sequence[str]) -> None:
    """Check what transformers would only check after the model is loaded."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to: expected some of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, got {name!r}")
        try:
            get_reporting_integration_callbacks([name])[0]()
        except (ImportError, RuntimeError) as error:
            raise ImportError(f"report_to: {name}: {first_line(error)}: install it, or set report_to=[]") from error


def _check_compiler() -> None:
    """DeepSpeed on CPU compiles an extension when it starts."""
    missing = [name for name in ("ninja", "c++") if shutil.which(name) is None]
    if choose_device().type == "cpu" and missing:
        raise ImportError(f"engine: DeepSpeed on CPU needs {' and '.join(missing)} on PATH: install it")


def open_source(model: str, model_type: str = "sailvl") -> Checkpoint:
    """
    Return the checkpoint of the model to train.

    Raises:
        ValueError: There is none, or it is of another type.
    """
    source = FileCheckpoint(*find_source(model))
    found = source.document("config.json").get("model_type")
    if found != model_type:
        fix = FIXES[model_type]
        got = f"model_type {found!r}" if found else "no config"
        raise ValueError(f"{model}: expected a {TITLES[model_type]}, got {got}: {fix}")
    if not source.entry.endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(f"{model}: expected safetensors, got {source.entry}: convert it with `sailvit convert`")
    return source


def check_kinds(recipe: Recipe, corpus: Corpus) -> None:
    """
    Check that the kinds of a recipe have their shares in the corpus.

    Raises:
        ValueError: One has another share.
    """
    counts, total = corpus.count_kinds(), len(corpus)
    for kind, share in (recipe.kinds or {}).items():
        got = counts.get(kind, 0) / total
        if abs(got - share) > max(KIND_TOLERANCE, 1 / total):
            known = ", ".join(counts)
            raise ValueError(
                f"kinds.{kind}: expected {share:.1%} of the samples, got {got:.1%} (the kinds are {known}): write "
                f"`kinds: {{{kind}: {share:g}}}` into {recipe.data}"
            )


def check_language(recipe: Recipe, config: SAILVLConfig) -> None:
    """
    Check that the language model has the size that a recipe is for.

    Raises:
        ValueError: It is smaller or larger.
    """
    if recipe.language_parameters is None:
        return
    low, high = recipe.language_parameters
    size = sum(parameter.numel() for parameter in meta_model(config).language_model.parameters())
    if not low <= size <= high:
        raise ValueError(
            f"language_parameters: {recipe.name} expects a language model of {low:,} to {high:,} parameters, got "
            f"{size:,} in {recipe.model}: compose one with another --language, or choose another recipe"
        )


def count_steps_without_gradient(batches: PackedBatches, steps: int, recipe: Recipe) -> int:
    """Return the number of steps of text alone, which train nothing while the language model is frozen."""
    if "language" in recipe.trainable or recipe.train_added_tokens:
        return 0
    tiles = batches.corpus.tiles
    if not (np.asarray(tiles) == 0).any():
        return 0
    return sum(not tiles[batches.samples(step)].any() for step in range(steps))


def _check_finished(recipe: Recipe, output: Path) -> None:
    recorded = read_json(output / RUN).get("recipe", {})
    if changed := differences({"recipe": recorded}, {"recipe": settings_of(recipe)}):
        raise ValueError(f"{output}: a finished run of another recipe ({'; '.join(changed)}): choose another output")


# Stopping


class StoppedAtStart(BaseException):
    """SIGTERM arrived before the first step; like KeyboardInterrupt no Exception, which packages catch."""


class Interruption:
    """
    Whether the run has to stop: SIGTERM arrived, or its time is over.

    Attributes:
        is_starting: There is nothing to save yet: SIGTERM ends the run at once.
    """

    def __init__(self, deadline: float | None):
        self.deadline, self.signalled, self.is_starting = deadline, False, True

    @property
    def ends_start(self) -> bool:
        return self.signalled and self.is_starting

    def is_due(self) -> bool:
        return self.signalled or self._is_late()

    @property
    def reason(self) -> str:
        return "max_hours" if self._is_late() else "SIGTERM"

    def _is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


@contextmanager
def _interruption(max_hours: float | None, started: float) -> Iterator[Interruption]:
    """Catch SIGTERM."""
    interruption, own = Interruption(None if max_hours is None else started + 3600 * max_hours), os.getpid()

    def on_signal(number: int, frame: Any) -> None:
        if os.getpid() != own:  # a process that counts tokens
            os._exit(128 + number)
        interruption.signalled = True
        if interruption.is_starting:
            raise StoppedAtStart

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGTERM, before)


class StopInTime(TrainerCallback):
    """Saves a checkpoint and stops all ranks after the same step, if one of them has to stop."""

    def __init__(self, trainer: SAILVLTrainer, interruption: Interruption):
        self.trainer, self.interruption, self.stopped = trainer, interruption, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.interruption.is_starting = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (due,) = self.trainer._sum_over_ranks([float(self.interruption.is_due())])
        if due and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


# Training


class RunTrainer(SAILVLTrainer):
    """A trainer whose checkpoints are complete or do not count, and have every weight once."""

    def __init__(self, *args: Any, write_records: Callable[[Path, int], None], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.write_records = write_records

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights, config and processor; ZeRO and FSDP2 save the weights with the state of the optimizer."""
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            super().save_model(output_dir, _internal_call)
        elif self.is_world_process_zero():
            parts = (self.model.config, self.model.generation_config, self.processing_class)
            for part in filter(None, parts):  # an encoder generates nothing
                part.save_pretrained(output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        folder = self.output / f"checkpoint-{step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self.write_records(folder, step)
                mark_complete(folder)
                keep_newest(self.output, self.recipe.save_total_limit)
            self.accelerator.wait_for_everyone()
        except Exception as error:
            if self.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)
            if is_lost_connection(error):
                raise
            kept = _describe_resume(self.output)
            raise OSError(f"{folder}: cannot be saved: {first_line(error)}: free space; {kept}") from error


def _record_stop(output: Path, rank: int, log: Log, reason: str) -> None:
    """Write that the run stopped, and after which step: that of its newest checkpoint."""
    last = newest_checkpoint(output)
    step = 0 if last is None else int(last.name.rpartition("-")[2])
    if rank == 0:
        write_json(output / STOPPED, {"step": step, "reason": reason})
    log(f"stopped after step {step} ({reason}); the same command goes on")


def _describe_resume(output: Path) -> str:
    last = newest_checkpoint(output)
    return f"the same command goes on from {last.name}" if last else "there is no earlier checkpoint"


class Stage:
    """A stage that is prepared: everything is loaded and checked, and nothing is trained yet."""

    def __init__(self, recipe: Recipe, engine: str, rank: int, ranks: int, log: Log):
        self.recipe, self.engine, self.rank, self.log = recipe, engine, rank, log
        self.output, self.precision = Path(recipe.output), recipe.precision
        self.is_encoder = recipe.objective == "next_patch"
        self.source = open_source(recipe.model, "sailvit" if self.is_encoder else "sailvl")
        check_separate(self.output, [self.source.source])
        load = load_tile_processor if self.is_encoder else load_processor
        self.processor, self.config = load(self.source.source.path("config.json").parent)
        check_language(recipe, self.config)
        self.batches = self._open_batches(ranks)
        self.resumed = self._find_checkpoint()
        self.parents = parent_stages(self.source)
        self.rows = added_token_ids(self.processor) if recipe.train_added_tokens else ()

    def _open_batches(self, ranks: int) -> PackedBatches:
        recipe = self.recipe
        share_prompt = not self.is_encoder and can_share_prompt(self.config, recipe.attn_implementation)
        workers = recipe.workers or None
        corpus = Corpus.from_yaml(
            recipe.data, self.processor, num_proc=workers, share_prompt=share_prompt, log=self.log
        )
        check_kinds(recipe, corpus)
        batches = TileBatches if self.is_encoder else PackedBatches
        return batches(
            corpus,
            recipe.samples_per_step,
            recipe.max_tokens_per_pack,
            recipe.max_tiles_per_pack,
            ranks=ranks,
            rank=self.rank,
            seed=recipe.seed,
            epochs=recipe.epochs,
            too_long=recipe.too_long,
            tile_cost=0.0 if self.is_encoder else tile_cost(self.config),  # patches are the tokens of an encoder
            packing=recipe.packing,
            uint8_tiles=True,
            flash_attention="flash" in (recipe.attn_implementation or ""),
        )

    def _find_checkpoint(self) -> Path | None:
        """Return the checkpoint that the run goes on from; a new run writes its run.json."""
        current, path = identity(self.recipe, self.batches, self.source, self.engine), self.output / RUN
        recorded = read_json(path)
        if recorded and (changed := differences(recorded, current)):
            fix = "give the same values, or another output"
            raise ValueError(f"{self.output}: the run there is another one ({'; '.join(changed)}): {fix}")
        if self.rank == 0:
            if not recorded:
                write_json(path, current)
            for broken in remove_incomplete(self.output):
                self.log(f"{broken}: not complete, removed")
        return newest_checkpoint(self.output)

    def train(self, interruption: Interruption) -> int:
        """Train the stage; return 0, or INTERRUPTED."""
        try:
            return self._train(interruption)
        except torch.OutOfMemoryError as error:
            raise TrainingError(self._describe_memory()) from error
        except Exception as error:
            if self.resumed and _is_corrupt_file(error):
                fix = "a file is corrupt: remove this folder, and the same command goes on from the one before"
                raise ValueError(f"{self.resumed}: {first_line(error)}: {fix}") from error
            if is_lost_connection(error):
                raise explain_lost_rank(error, _describe_resume(self.output)) from error
            raise

    def _train(self, interruption: Interruption) -> int:
        trainer = self._make_trainer()
        stop = StopInTime(trainer, interruption)
        trainer.add_callback(stop)
        self._announce(trainer)
        resumed = None if self.resumed is None else str(self.resumed)
        trainer.train(resume_from_checkpoint=resumed)
        if stop.stopped:
            _record_stop(self.output, self.rank, self.log, interruption.reason)
        else:
            self._hand_over(trainer)
        if dist.is_initialized():
            dist.destroy_process_group()
        return INTERRUPTED if stop.stopped else 0

    def _make_trainer(self) -> RunTrainer:
        model = load_for(self.recipe, self.source, self.recipe.attn_implementation)
        set_trainable(model, self.recipe, self.rows)
        self.log(trainable_table(model, self.recipe))
        arguments = training_arguments(
            self.recipe, self.output, len(self.batches), model, save_total_limit=None, run_name=str(self.recipe.name)
        )
        self.precision = "bfloat16" if arguments.bf16 else "float32"
        return RunTrainer(
            model,
            self.recipe,
            self.batches,
            self.output,
            arguments,
            processing_class=self.processor,
            read_weight=weight_reader(model, self.source),
            write_records=self._write_records,
        )

    def _announce(self, trainer: SAILVLTrainer) -> None:
        batches, steps, corpus = self.batches, trainer.args.max_steps, self.batches.corpus
        blank = count_steps_without_gradient(batches, steps, self.recipe)
        if blank == steps:
            raise ValueError(
                f"{self.recipe.data}: all steps are text alone, which train nothing but the language model"
            )
        if blank:
            self.log(f"{blank} of {steps} steps are text alone: they train nothing, since the language model is frozen")
        if corpus.too_long:
            done = ", ".join(f"{count} {what}" for what, count in corpus.too_long.items())
            self.log(f"samples that are too long for a pack (too_long: {self.recipe.too_long}): {done}")
        if self.rank == 0 and self.resumed is None:
            entries = [{"step": 0, **entry.to_dict()} for entry in corpus.skipped]
            (self.output / SKIPPED).write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
        where = "" if self.resumed is None else f", from {self.resumed.name}"
        self.log(
            f"{self.recipe.name}: {steps} steps of {batches.samples_per_step} samples, {len(corpus)} in an epoch, "
            f"{self.engine} on {batches.ranks} rank(s){where}"
        )

    def _stages(self, step: int) -> list[dict[str, Any]]:
        own = describe_stage(self.recipe, self.batches, self.source, step, self.engine, self.precision)
        return [*self.parents, own]

    def _write_records(self, folder: Path, step: int) -> None:
        write_training(folder, self._stages(step))

    def _hand_over(self, trainer: SAILVLTrainer) -> None:
        trained = trained_weights(trainer)
        unset_hf_deepspeed_config()  # else ZeRO-3 would shard the model that one rank builds, and wait for the others
        if self.rank == 0:
            model = build_result(trained, self.recipe, self.source, self.rows)
            write_result(model, self.source, self.output, self._stages(trainer.state.global_step))
            self.log(f"{self.output}: finished")
        trainer.accelerator.wait_for_everyone()

    def _describe_memory(self) -> str:
        """Return which settings would fit into the memory of the device."""
        if self.is_encoder:
            most = self.recipe.max_tokens_per_pack
            return f"out of memory: lower max_tokens_per_pack={most}, or set gradient_checkpointing=true"
        corpus, ranks = self.batches.corpus, self.batches.ranks
        plan = make_plan(self.config, self.recipe, corpus=corpus, ranks=ranks)
        available = USED_MEMORY * torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return f"out of memory: {oom_hint(plan, available)}"


# The plan


def plan_run(recipe: Recipe, ranks: int, card: str | None, samples: int | None = None) -> tuple[Plan, str]:
    """
    Return the plan of a run from the config of its model; no weights are read.

    Returns:
        The plan, and where its number of samples is from, if it is neither given nor that of a corpus.

    Raises:
        ValueError: The recipe has no model, or the card is unknown.
    """
    if not recipe.model:
        raise ValueError("model: missing; give it as model=...")
    if recipe.objective != "next_token":
        raise ValueError(f"--plan: {recipe.name}: expected objective next_token, got {recipe.objective}")
    processor, config = load_processor(recipe.model)
    check_language(recipe, config)
    corpus = None
    if recipe.data and samples is None:
        share_prompt = can_share_prompt(config, recipe.attn_implementation)
        corpus = Corpus.from_yaml(recipe.data, processor, share_prompt=share_prompt)
    paper, origin = PAPER_STAGES.get(recipe.name or ""), ""
    if corpus is None and samples is None and paper is not None:
        samples, origin = paper.samples, f"{paper.samples:,}, as in the paper: give data= or --samples"
    return make_plan(config, recipe, corpus=corpus, samples=samples, ranks=ranks, card=card, stage=recipe.name), origin
