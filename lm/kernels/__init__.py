"""Attention and cross-entropy that never hold the big array; drop-in for the references in `lm.nn`."""
