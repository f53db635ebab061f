"""`sailvit report`: the stages of training side by side."""

from .build import Report, build_report
from .page import as_markdown, check_outputs, page, write_report


__all__ = ["Report", "as_markdown", "build_report", "check_outputs", "page", "write_report"]
