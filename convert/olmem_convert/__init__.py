"""From a checkpoint of OLMo, OLMo-core, BakaLLM or Transformers to a verified Olmem model, and back to Transformers."""

from .convert import convert
from .errors import CheckpointError
from .export import export
from .hub import push
from .verify import verify

__all__ = ["CheckpointError", "convert", "export", "push", "verify"]
