"""Finetune Llasa, the LLaMA that speaks, in JAX."""

__version__ = "0.1.0"
