"""From a checkpoint of OLMo, OLMo-core, BakaLLM or Transformers to a verified Olmem model, and back to Transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError
from .options import CardOptions, ConvertOptions, EvaluateOptions, PushOptions, VerifyOptions

if TYPE_CHECKING:
    from .commands.carding import card
    from .commands.converting import convert
    from .commands.evaluating import evaluate
    from .commands.pushing import push
    from .commands.serving import serve
    from .commands.tokenizing import add_tokenizer
    from .commands.verifying import verify

__all__ = [
    "CardOptions",
    "CheckpointError",
    "ConvertOptions",
    "EvaluateOptions",
    "PushOptions",
    "VerifyOptions",
    "add_tokenizer",
    "card",
    "convert",
    "evaluate",
    "push",
    "serve",
    "verify",
]

# Where each command is. It is imported when it is first asked for: torch takes seconds, which `--help` has not.
PLACES = {
    "add_tokenizer": "commands.tokenizing",
    "card": "commands.carding",
    "convert": "commands.converting",
    "evaluate": "commands.evaluating",
    "push": "commands.pushing",
    "serve": "commands.serving",
    "verify": "commands.verifying",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(import_module(f".{PLACES[name]}", __name__), name)
    globals()[name] = function
    return function
