"""
Checkpoints in any layout to any layout: read lazily, named by tables, written whole or not at all, and looked over.

Nothing here builds a model to move a tensor, and importing it imports neither torch nor transformers.
"""

from .conversion import convert_checkpoint
from .inspect import inspect_checkpoint
from .layouts import LAYOUTS, convert_tensors
from .problems import CheckpointError


__all__ = ["LAYOUTS", "CheckpointError", "convert_checkpoint", "convert_tensors", "inspect_checkpoint"]
