"""
Two steps of training of a toy SAIL-VL in a real engine, which then saves as it does. Beside what it wrote lie the
weights that it had in that moment, in the precision in which it had them.

    python -m torch.distributed.run --nproc_per_node 2 tests/run_engine.py ENGINE BASE OUT

BASE is a release of tests/toy_sailvl.py; OUT gets `checkpoint-2/`, by the engine, and `truth.safetensors`, by this
script.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from sailvit import SAILVLForConditionalGeneration


IMAGE = 309  # <IMG_CONTEXT> in the toy tokenizer
FROZEN = ("vision_model.preprocessor.", "language_model.model.layers.0.")
STEPS = 2
ZERO = {
    "bf16": {"enabled": True},
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    # The first below what it has to do for sub-groups and their edges; the second keeps nothing whole.
    "zero_optimization": {"sub_group_size": 20_000, "stage3_param_persistence_threshold": 0},
}


class Prompts(torch.utils.data.Dataset):
    """Random text about a random tile."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(0, 256, (12,), generator=generator).tolist()
        ids = torch.tensor(text[:4] + [IMAGE] * 4 + text[4:])
        return {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(3, 56, 56, generator=generator)}


def settings(engine: str) -> dict[str, Any]:
    """What the engine is, as TrainingArguments take it."""
    if engine.startswith("zero"):
        stage = {"stage": int(engine[4]), **(ZERO["zero_optimization"] if engine[4] == "3" else {})}
        gather = {"stage3_gather_16bit_weights_on_model_save": True} if engine.endswith("gathered") else {}
        return {"bf16": True, "deepspeed": {**ZERO, "zero_optimization": {**stage, **gather}}}
    if engine.startswith("fsdp"):
        kind = "FULL_STATE_DICT" if engine.endswith("full") else "SHARDED_STATE_DICT"
        layers = ["Qwen2DecoderLayer", "SAILViTBlock"]
        config = {"version": 2, "transformer_layer_cls_to_wrap": layers, "state_dict_type": kind}
        return {"bf16": True, "fsdp": True, "fsdp_config": config}
    return {}


def train(engine: str, model: nn.Module, out: Path) -> Trainer:
    """Two steps, and the folder that the Trainer makes of them."""
    arguments = TrainingArguments(
        str(out),
        use_cpu=True,
        optim="adamw_torch",
        learning_rate=1e-2,
        max_steps=STEPS,
        save_steps=STEPS,
        per_device_train_batch_size=1,
        include_num_input_tokens_seen="all",
        report_to="none",
        disable_tqdm=True,
        **settings(engine),
    )
    if engine.startswith("fsdp"):
        assert arguments.device.type == "cpu"
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        # FSDP on a CPU would become DDP in silence.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    trainer = Trainer(model, arguments, train_dataset=Prompts())
    trainer.train()
    wanted = "DEEPSPEED" if engine.startswith("zero") else "FSDP" if engine.startswith("fsdp") else ""
    assert wanted in str(trainer.accelerator.distributed_type), trainer.accelerator.distributed_type
    return trainer


def truth_of(engine: str, trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every parameter, whole: in float32 where the engine has it so, frozen ones as it holds them."""
    if engine.startswith("zero"):
        return truth_of_zero(trainer)
    if engine.startswith("fsdp"):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        whole = StateDictOptions(full_state_dict=True)
        return get_model_state_dict(trainer.model_wrapped, options=whole)
    return dict(trainer.model.named_parameters(remove_duplicate=False))


def truth_of_zero(trainer: Trainer) -> dict[str, torch.Tensor]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    tensors = {}
    for name, parameter in trainer.model_wrapped.module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            tensors[name] = safe_get_full_fp32_param(parameter).clone()
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                tensors[name] = parameter.detach().clone()
    return tensors


def run(engine: str, base: Path, out: Path) -> None:
    torch.manual_seed(0)
    model = build(base)
    trainer = train(engine, with_adapters(model) if engine.endswith("peft") else model, out)
    truth = truth_of(engine, trainer)
    if engine.endswith("peft"):
        truth = merged(with_adapters(build(base)), truth)
    if engine == "dcp":
        save_dcp(trainer, out)
    if int(os.environ.get("RANK", "0")) == 0:
        whole = {name: tensor.detach().contiguous().clone() for name, tensor in truth.items()}
        save_file(whole, out / "truth.safetensors")
        (out / "done.json").write_text(json.dumps({"engine": engine, "names": len(whole)}))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def build(base: Path) -> nn.Module:
    """The model in float32, some parts frozen."""
    model = SAILVLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    model.config.image_token_id = IMAGE
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN))
    return model


def merged(model: nn.Module, trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What peft makes of adapters to the base in float32."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(trained[name])
    return dict(model.merge_and_unload().named_parameters(remove_duplicate=False))


def with_adapters(model: nn.Module) -> nn.Module:
    """LoRA in the tower and in the language model; two layers of the connector are trained whole."""
    from peft import LoraConfig, get_peft_model

    modules = ["qkv", "attn.proj", "fc1", "q_proj", "down_proj"]
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=modules, modules_to_save=["mlp1.1", "mlp1.3"], init_lora_weights=False
    )
    return get_peft_model(model, config)


def save_dcp(trainer: Trainer, out: Path) -> None:
    """Through torch's own functions, the parameters cut along rows or columns, beside the state of the optimizer."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cut = {}
    for index, (name, tensor) in enumerate(trainer.model.state_dict().items()):
        cut[name] = distribute_tensor(tensor, mesh, [Shard(index % tensor.ndim)])
    moments = {name: {"exp_avg": tensor} for name, tensor in cut.items()}
    dcp.save({"model": cut, "optimizer": {"state": moments}, "step": STEPS}, checkpoint_id=out / "dcp")


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
