"""Publish a folder: write its model card, check that a copy loads in a clean process, upload it in one commit."""

# Importing it imports neither torch nor transformers.
from ..convert.export.card import write_model_card
from .checks import PublishError, check_before_publish
from .push import Published, PushError, push_folder


__all__ = ["PublishError", "Published", "PushError", "check_before_publish", "push_folder", "write_model_card"]
