"""
Convert, compose and inspect checkpoints in any layout. Tensors are converted without building a model; importing this
package imports neither torch nor transformers.
"""

from .compose import compose_model
from .conversion import convert_checkpoint
from .inspect import inspect_checkpoint
from .models.aimv2_names import LAYOUTS
from .models.aimv2_state_dict import convert_tensors
from .refresh import refresh_code
from .storage.errors import CheckpointError


__all__ = [
    "LAYOUTS", "CheckpointError", "compose_model", "convert_checkpoint", "convert_tensors", "inspect_checkpoint",
    "refresh_code",
]  # fmt: skip
