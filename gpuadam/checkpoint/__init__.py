"""Checkpoints."""

from .safetensors import CheckpointError

__all__ = ["CheckpointError"]
