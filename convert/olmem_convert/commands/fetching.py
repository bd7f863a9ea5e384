"""SRC as the command line names it: a folder or a file, or else the id of a model on the Hub, which is downloaded.

What is downloaded lies in the Hub's cache, where the next command finds it again. It is read as any checkpoint is:
nothing of a repository's code is fetched, and none is run.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from ..errors import CheckpointError
from ..formats.detect import recognised
from ..options import OfNative, Say
from ..publish.remote import keeping_token, quiet_hub
from ..reading.olmem_folder import COMPANIONS
from ..writing.tokenizer import SLOW

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# What the formats read, from the root of the repository on; a star stands for any signs, folders included.
FILES = (
    *("config.json", "config.yaml", "generation_config.json", ".metadata", ".metadata.json", "__*.distcp"),
    *("model*.safetensors", "model.safetensors.index.json", "model.pt", "model/*", "model_and_optim/*"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer/tokenizer.json", *COMPANIONS, *SLOW),
)
PICKLES = ("*.bin", "pytorch_model.bin.index.json")  # which are read where there is nothing else


def fetched(source: str | Path, options: OfNative, say: Say) -> Path:
    """The folder or file `source` or, where there is none, the snapshot of the model of this id in the Hub's cache.

    Raises:
        CheckpointError: when the model cannot be downloaded, or a revision is given for what lies on this machine.
    """
    path, revision = Path(source), options.revision
    if path.exists() or not ID.fullmatch(str(source)):
        if revision is not None:
            raise CheckpointError(
                f"`revision` must be left out unless SRC is a model on the Hub (got {revision!r} for {path}); leave it "
                "out, or name the model by its id."
            )
        return path
    repo_id = str(source)
    named = repo_id + (f" at {revision}" if revision else "")
    say(f"looking for {named} in the Hub's cache" if is_offline_mode() else f"downloading {named} from the Hub")
    token = get_token()
    guarded = keeping_token(token, HfApi().endpoint, bounded=False) if token else nullcontext()
    with quiet_hub(), bars(), guarded, told(repo_id, revision):
        commit = revision if is_offline_mode() else commit_of(repo_id, revision)
        folder = download(repo_id, commit, FILES)
        if not recognised(folder):
            folder = download(repo_id, commit, (*FILES, *PICKLES))
    say(f"{repo_id} is at commit {folder.name}")
    return folder


def commit_of(repo_id: str, revision: str | None) -> str | None:
    """Returns the commit that the Hub has now. `snapshot_download` would take an older one where it has no answer.

    What the revision's name stands for is noted in the Hub's cache, where it is found without a network.
    """
    commit = HfApi().repo_info(repo_id, revision=revision).sha
    HfApi().resolve_revision(repo_id, revision=revision)
    return commit


def download(repo_id: str, revision: str | None, files: Sequence[str]) -> Path:
    """Returns the snapshot, once it has those of these files that the repository has."""
    return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(files), ignore_patterns=["*.py"]))


@contextmanager
def bars() -> Iterator[None]:
    """Shows the progress bars of huggingface_hub on a terminal. They are off with those of Transformers."""
    off = are_progress_bars_disabled()
    if sys.stderr.isatty():
        enable_progress_bars()
    else:
        disable_progress_bars()
    try:
        yield
    finally:
        disable_progress_bars() if off else enable_progress_bars()


@contextmanager
def told(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises into an error that says the way out."""
    page = f"{HfApi().endpoint}/{repo_id}"
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"`SRC` must be a model that you may read ({repo_id} asks for its terms to be accepted); accept them at "
            f"{page}, and run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"`SRC` must be a checkpoint ({repo_id} does not exist here, and the Hub has no such model that you may "
            "read); name the folder that holds it, or, if it is a private model, run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"`revision` must be a branch, a tag or a commit of {repo_id} (got {revision!r}); look it up at "
            f"{page}/tree/main."
        ) from error
    except HFValidationError as error:
        raise CheckpointError(
            f"`SRC` must be a checkpoint or the id of a model on the Hub (got {repo_id}, which does not exist here, "
            f"and of which the Hub's client says: {first_line(error)}); name the folder that holds it, or correct the "
            "id."
        ) from error
    except (HTTPError, RevisionResolutionError, OSError, ValueError, RuntimeError) as error:
        if is_offline_mode() and isinstance(error, LocalEntryNotFoundError):
            raise CheckpointError(
                f"`SRC` must be a checkpoint ({repo_id} does not exist here, nor all of it in the Hub's cache, and "
                "HF_HUB_OFFLINE is set); name the folder that holds it, or unset HF_HUB_OFFLINE to download it."
            ) from error
        if isinstance(error, OSError) and error.errno is not None:  # this machine's, as a full disk is
            raise CheckpointError(
                f"`SRC` must be written to the Hub's cache, as {repo_id} does not exist here (got: "
                f"{first_line(error)}); mend that, or set HF_HUB_CACHE to a folder elsewhere."
            ) from error
        raise CheckpointError(
            f"`SRC` must be downloaded from the Hub, as {repo_id} does not exist here (got: {first_line(error)}); run "
            "the same command again, which goes on with what has arrived, or set HF_HUB_OFFLINE=1 to use what the "
            "Hub's cache holds."
        ) from error


def first_line(error: Exception) -> str:
    """Returns what an error says, in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:500]
