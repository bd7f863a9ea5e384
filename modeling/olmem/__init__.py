# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Olmem: a causal language model family for Hugging Face Transformers. Importing it registers the Auto classes."""

from .configuration_olmem import OlmemConfig
from .modeling_olmem import (
    OlmemForCausalLM,
    OlmemForSequenceClassification,
    OlmemForTokenClassification,
    OlmemModel,
)

__version__ = "0.1.0"

__all__ = [
    "OlmemConfig",
    "OlmemForCausalLM",
    "OlmemForSequenceClassification",
    "OlmemForTokenClassification",
    "OlmemModel",
]
