"""From a checkpoint of OLMo, OLMo-core, BakaLLM or Transformers to a verified Olmem model, and back to Transformers."""

from .card import card
from .convert import convert
from .errors import CheckpointError
from .evaluate import evaluate
from .export import export
from .hub import push
from .verify import verify

__all__ = ["CheckpointError", "card", "convert", "evaluate", "export", "push", "verify"]
