"""From a checkpoint of OLMo, OLMo-core, BakaLLM or Transformers to a verified Olmem model, and back to Transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError

if TYPE_CHECKING:
    from .commands.converting import convert
    from .commands.evaluating import evaluate
    from .commands.exporting import export
    from .proof.verification import verify
    from .publish.model_card import card
    from .publish.pushing import push

__all__ = ["CheckpointError", "card", "convert", "evaluate", "export", "push", "verify"]

# Where each function is. It is imported when it is first asked for: torch takes seconds, which `--help` has not.
PLACES = {
    "card": "publish.model_card",
    "convert": "commands.converting",
    "evaluate": "commands.evaluating",
    "export": "commands.exporting",
    "push": "publish.pushing",
    "verify": "proof.verification",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(import_module(f".{PLACES[name]}", __name__), name)
    globals()[name] = function
    return function
