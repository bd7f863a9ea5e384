"""`olmem serve`: Transformers' own server, which finds the classes of Olmem among its own."""

import signal
from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError
from ..options import Say


def serve(source: str, arguments: Sequence[str] = (), *, say: Say = print) -> dict[str, str]:
    """Serves a folder or repository until it is stopped.

    Transformers' server looks a model's class up in `transformers`, and answers 500 where it finds none.

    Args:
        source: an Olmem folder, or a repository on the Hub.
        arguments: options of `transformers serve`.
    """
    from olmem import OlmemConfig
    from olmem.fallback_olmem import refuse_own_features
    from olmem.heads_olmem import AUTO_CLASSES
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise CheckpointError("the server's packages must be installed; `pip install 'transformers[serving]'`.")
    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise CheckpointError(f"{source} must hold a config.json (it does not); convert a checkpoint first.")
    if "--continuous-batching" in arguments:
        try:
            refuse_own_features(OlmemConfig.from_pretrained(source), "with `--continuous-batching`; leave it out")
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    from transformers.cli.serving import model_manager
    from transformers.cli.transformers import app

    looked_up = model_manager.transformers  # which is not always the module that others import
    for _, model_class in AUTO_CLASSES:
        setattr(looked_up, model_class.__name__, model_class)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the server's threads would outlive an exit
    say(f"serving {source} by transformers {looked_up.__version__}")
    app(["serve", source, *arguments], prog_name="olmem", standalone_mode=False)
    return {"served": source}


__all__ = ["serve"]
