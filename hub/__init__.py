"""
Folders to the Hub: a card is written, the gate tries the folder as a stranger would, and one commit publishes it.

Importing it imports neither torch nor transformers.
"""

from .checks import GateError, gate_folder
from ..convert.export.card import write_card
from .push import Published, PushError, push_folder


__all__ = ["GateError", "Published", "PushError", "gate_folder", "push_folder", "write_card"]
