"""A recipe for tests of training: the fields of `sailvit.train.recipe.Recipe` with values for toy models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ToyRecipe:
    trainable: list[str] = field(default_factory=lambda: ["vision", "connector", "language"])
    learning_rate: float | Mapping[str, float] = 1e-3
    samples_per_step: int = 5
    max_steps: int | None = None
    loss_reduction: str = "token"
    precision: str = "float32"
    engine: str = "single"
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    warmup_ratio: float = 0.3
    lr_scheduler_type: str = "cosine"
    min_learning_rate_ratio: float = 0.1
    gradient_checkpointing: bool | str = False
    lora: Mapping[str, Any] = field(default_factory=dict)
    train_added_tokens: bool = False
    attn_implementation: str | None = None
    save_steps: int = 100
    save_total_limit: int = 2
    logging_steps: int = 1
    timeout_minutes: float = 5
    report_to: list[str] = field(default_factory=list)
    peak_tflops: float | None = None
    workers: int = 0
    seed: int = 0
