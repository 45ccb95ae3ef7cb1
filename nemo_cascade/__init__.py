"""Nemotron-Cascade 2, end to end: SFT, reinforcement learning domain by domain, multi-domain on-policy distillation."""

__version__ = "0.1.0"
