"""
Folders to the Hub: a card is written, the gate tries the folder as a stranger would, and one commit publishes it.

Importing it imports neither torch nor transformers.
"""

from ..convert.export.card import write_model_card
from .checks import PublishError, check_before_publish
from .push import Published, PushError, push_folder


__all__ = ["PublishError", "Published", "PushError", "check_before_publish", "push_folder", "write_model_card"]
