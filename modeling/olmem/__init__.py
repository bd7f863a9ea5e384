# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Olmem: a causal language model family for Hugging Face Transformers. Importing it registers the Auto classes."""

from transformers import AutoConfig

from .cache_olmem import OlmemCache
from .configuration_olmem import OlmemConfig
from .export_olmem import OlmemStep
from .heads_olmem import OlmemForSequenceClassification, OlmemForTokenClassification
from .modeling_olmem import OlmemForCausalLM, OlmemModel
from .stream_olmem import OlmemStream

__version__ = "0.2.0"

# Here, not in the files that are copied into Hub repositories: the name is one for the process, and the code of one
# repository must not load the next one. Model classes register by their own configuration class, where they are.
AutoConfig.register("olmem", OlmemConfig, exist_ok=True)

__all__ = [
    "OlmemCache",
    "OlmemConfig",
    "OlmemForCausalLM",
    "OlmemForSequenceClassification",
    "OlmemForTokenClassification",
    "OlmemModel",
    "OlmemStep",
    "OlmemStream",
]
