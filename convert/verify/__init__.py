"""Verification that a written folder loads and computes what its source does."""
