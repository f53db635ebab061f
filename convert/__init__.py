"""
Checkpoints in any layout to any layout: read lazily, named by tables, written whole or not at all, and looked over.

Nothing here builds a model to move a tensor, and importing it imports neither torch nor transformers. A new model is
composed by the classes that will run it.
"""

from .compose import compose_model
from .conversion import convert_checkpoint
from .inspect import inspect_checkpoint
from .models.aimv2_names import LAYOUTS
from .models.aimv2_state_dict import convert_tensors
from .refresh import refresh_code
from .storage.errors import CheckpointError


__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "compose_model",
    "convert_checkpoint",
    "convert_tensors",
    "inspect_checkpoint",
    "refresh_code",
]
