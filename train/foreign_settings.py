# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of transformers, ms-swift, LLaMA-Factory, InternVL and LLaVA, and what a recipe has in their place."""

_FROZEN = {
    "vision": ("freeze_vit", "freeze_vision_tower", "freeze_backbone", "unfreeze_mm_vision_tower"),
    "connector": ("freeze_aligner", "freeze_multi_modal_projector", "freeze_mlp", "freeze_mm_mlp_adapter"),
    "language": ("freeze_llm", "freeze_language_model"),
}
_ALONE = ("tune_mm_mlp_adapter", "train_mm_proj_only")
_RENAMED = {
    "learning_rate": ("lr",),
    "learning_rate.vision": ("vit_lr", "mm_vision_tower_lr", "vision_lr"),
    "learning_rate.connector": ("aligner_lr", "mm_projector_lr", "merger_lr"),
    "learning_rate.language": ("llm_lr",),
    "epochs": ("num_train_epochs", "num_epochs"),
    "model": ("model_name_or_path", "model_path", "model_id_or_path", "pretrained_model_name_or_path"),
    "data": ("dataset", "dataset_dir", "data_path", "meta_path", "train_file"),
    "output": ("output_dir",),
    "max_tokens_per_pack": ("max_length", "max_seq_length", "model_max_length", "cutoff_len", "max_packed_tokens"),
    "max_tiles_per_pack": ("num_images_expected",),
    "packing": ("neat_packing", "padding_free", "use_packed_ds", "packing_length"),
    "precision": ("bf16", "fp16", "torch_dtype", "dtype", "pure_bf16"),
    "engine": ("deepspeed", "fsdp", "fsdp_config"),
    "max_grad_norm": ("gradient_clipping", "clip_grad"),
    "warmup_ratio": ("warmup_steps",),
    "lr_scheduler_type": ("lr_scheduler", "lr_decay_style"),
    "min_learning_rate_ratio": ("min_lr", "min_lr_ratio", "lr_scheduler_kwargs"),
    "gradient_checkpointing": ("grad_checkpoint", "activation_checkpointing", "vit_gradient_checkpointing"),
    "attn_implementation": ("attn_impl", "flash_attn", "use_flash_attn"),
    "workers": ("dataloader_num_workers", "preprocessing_num_workers", "dataset_num_proc"),
    "seed": ("data_seed",),
}
_ADAPTERS = {
    "language": ("lora_rank", "lora_r", "lora_alpha", "lora_dropout", "lora_target", "use_llm_lora", "use_peft"),
    "vision": ("use_backbone_lora",),
}
_BATCH = (
    "per_device_train_batch_size",
    "per_gpu_train_batch_size",
    "gradient_accumulation_steps",
    "train_batch_size",
    "global_batch_size",
    "batch_size",
)
_OTHERS = {
    "unfreeze_vit_layers": "a component is trained as a whole; lora.vision.r=16 trains a small part of it",
    "finetuning_type": "`trainable` lists what is trained, `lora` the components that have an adapter",
    "train_type": "`trainable` lists what is trained, `lora` the components that have an adapter",
    "tuner_type": "`trainable` lists what is trained, `lora` the components that have an adapter",
    "max_dynamic_patch": "`max_tiles` of a source in corpus.yaml is the most tiles of an image",
    "max_pixels": "`max_tiles` of a source in corpus.yaml is the most tiles of an image",
    "drop_path_rate": "the encoder, AIMv2, has no drop path",
    "resume_from_checkpoint": "the same command goes on with an unfinished output",
    "optim": "the optimizer is AdamW",
}

# Name elsewhere -> what to write in a recipe.
FOREIGN_SETTINGS = {
    **{
        name: f"`trainable` lists the components that are trained: to freeze the {component} component, leave it out"
        for component, names in _FROZEN.items()
        for name in names
    },
    **dict.fromkeys(_ALONE, "`trainable` lists the components that are trained: trainable=connector"),
    **{name: f"here it is `{ours}`" for ours, names in _RENAMED.items() for name in names},
    **{name: f"here it is `lora`, such as lora.{ours}.r=16" for ours, names in _ADAPTERS.items() for name in names},
    **dict.fromkeys(_BATCH, "`samples_per_step` is the number of samples of an optimizer step, all ranks together"),
    **_OTHERS,
}
