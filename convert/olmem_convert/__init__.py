"""From a native OLMo, OLMo-core or BakaLLM checkpoint to a verified model for Hugging Face Transformers."""

from .convert import convert
from .errors import CheckpointError
from .verify import verify

__all__ = ["CheckpointError", "convert", "verify"]
