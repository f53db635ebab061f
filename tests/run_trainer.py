"""
Train a toy SAIL-VL in an engine, on one or more processes, and save its log, gradients and weights.

    torchrun --nproc_per_node 2 tests/run_trainer.py '{"engine": "zero3"}' '{"packing": false}' OUT

The first argument has fields of the recipe, the second arguments of PackedBatches. OUT gets log.jsonl,
weights.safetensors and, from engines that keep gradients whole, gradients.safetensors of the first step.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from run_engine import truth_of
from safetensors.torch import save_file
from toy_corpus import make_corpus, make_model, make_processor, make_samples
from toy_recipe import ToyRecipe
from transformers import TrainerCallback

from sailvit.train.components import added_token_ids, set_trainable
from sailvit.train.packing import PackedBatches
from sailvit.train.trainer import SAILVLTrainer, training_arguments


class SaveGradients(TrainerCallback):
    def __init__(self, path: Path):
        self.path = path

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        """Save the gradients of the first step, after clipping."""
        if state.global_step == 0 and state.is_world_process_zero:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            save_file(gradients, self.path)


def allow_fsdp_on_cpu(arguments) -> None:
    """FSDP on a CPU would become DDP in accelerate; for tests alone."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    assert arguments.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def run(recipe: ToyRecipe, options: dict, out: Path) -> None:
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    private = out / f"rank-{rank}"
    processor = make_processor(private / "tokenizer")
    corpus = make_corpus(make_samples(12), processor, private)
    batches = PackedBatches(
        corpus, **{"samples_per_step": recipe.samples_per_step, "max_tokens_per_pack": 400, "epochs": 2, **options},
        ranks=ranks, rank=rank,
    )  # fmt: skip
    model = make_model(processor)
    set_trainable(model, recipe, added_token_ids(processor))
    arguments = training_arguments(recipe, out, len(batches), model)
    if recipe.engine == "fsdp2" and "NO_SHIM" not in os.environ:
        allow_fsdp_on_cpu(arguments)
    start = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    reader = start.__getitem__ if "READ_WEIGHTS" in os.environ else None
    trainer = SAILVLTrainer(model, recipe, batches, out, arguments, reader)
    if recipe.engine in ("single", "ddp"):
        trainer.add_callback(SaveGradients(out / "gradients.safetensors"))
    resume = os.environ.get("RESUME")
    trainer.train(resume_from_checkpoint=resume)
    kind = {"zero2": "zero2", "zero3": "zero3", "fsdp2": "fsdp2"}.get(recipe.engine, "")
    weights = truth_of(kind, trainer)
    if rank == 0:
        save_file(start, out / "start.safetensors")
        whole = {name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}
        save_file(whole, out / "weights.safetensors")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    run(ToyRecipe(**json.loads(sys.argv[1])), json.loads(sys.argv[2]), Path(sys.argv[3]))
