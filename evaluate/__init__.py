"""Evaluation of vision encoders."""
