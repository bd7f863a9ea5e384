"""Metrics for Hugging Face's `evaluate`, files that `evaluate.load(path(…))` reads without a network.

None of them imports anything of Olmem, so that they measure any causal model of Transformers. Each has its card beside
it, of the same name.
"""

from pathlib import Path

METRICS = ("long_recall", "perplexity_stream", "stream_state")


def path(name: str) -> str:
    """Returns the path of a metric, for `evaluate.load`."""
    if name not in METRICS:
        raise ValueError(f"`name` must be one of {', '.join(METRICS)} (got {name!r}); choose one.")
    return str(Path(__file__).with_name(f"{name}.py"))
