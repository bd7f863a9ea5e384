"""Files of a folder that is there already, each written whole or left as it was."""

import os
import uuid
from collections.abc import Iterable
from pathlib import Path

from ..errors import CheckpointError


def require_replaceable(paths: Iterable[Path]) -> None:
    """Raises CheckpointError for a folder where a file is going to be written, before anything is computed for it."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            raise CheckpointError(
                f"`{path.name}` must be a file that can be written ({path} is a folder); move it away."
            )


def replace_text(path: Path, text: str) -> None:
    """Writes the text whole, or leaves the file as it was."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes) -> None:
    """Writes the file whole, or leaves it as it was."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise CheckpointError(
            f"`{path.name}` must be a file that can be written ({path}: {error.strerror or error}); move away what is "
            "in its place, free space, or correct the permissions of its folder."
        ) from error
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
