"""`sailvit probe`: accuracies of heads on the frozen features of encoders."""

from .heads import HeadOptions
from .run import ProbeOptions, run_probe


__all__ = ["HeadOptions", "ProbeOptions", "run_probe"]
