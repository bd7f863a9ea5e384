"""From an Olmem folder to the Hub: the whole of it in one commit, verified there, or nothing.

The plan compares the folder with the branch as one commit has it. The upload is one commit on top of that one, which
the Hub refuses if the branch has moved. A commit whose answer was lost is found again by what it holds and by what it
lies on, so that none is made twice. The tag comes last: it says that the Hub sends the files of this folder, bit for
bit, and that they load, by the repository's own code, to the same logits.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import CheckpointError
from ..options import PushOptions, Say, silent
from ..publish.metadata import named_after
from ..publish.model_card import make_card, read_values
from ..publish.planning import MAIN, make_plan, table
from ..publish.release import LocalFile, check_release, read_all
from ..publish.remote import Remote, keeping_token, quiet_hub
from ..publish.sending import Push
from ..publish.standing_card import is_own, said
from ..reading.olmem_folder import CARD_NAME, REPORT_NAME
from ..reading.texts import read_json
from ..writing.texts import replace_text

REF_NAME = re.compile(r"(?!refs/)(?!.*\.\.)[a-z0-9][\w.+-]*(/[a-z0-9][\w.+-]*)*(?<!\.)(?<!\.lock)", re.ASCII | re.I)


def push(out: str | Path, repo_id: str, options: PushOptions | None = None, *, say: Say = silent) -> dict[str, Any]:
    """Plans the upload of the Olmem folder `out` to the model `repo_id` of the Hub and, with `execute`, does it.

    The token is the one that huggingface_hub finds. Returns `plan`, `commit`, `pull_request`, `verified` and `tagged`.

    Raises:
        CheckpointError: when anything is amiss. It says what state the Hub is in.
    """
    options = options or PushOptions()
    check_options(repo_id, options)
    files = check_release(out)
    if is_offline_mode():
        raise CheckpointError("`HF_HUB_OFFLINE` must be unset to push (it is set); unset it.")
    token = find_token()
    files = titled(Path(out), repo_id, files, options.execute, say)
    remote = Remote(repo_id, token)
    guarded = keeping_token(token, remote.api.endpoint)
    with quiet_hub(), guarded, remote.telling(lambda: "nothing was sent"):
        remote.check_card(files[CARD_NAME].path)
        plan = make_plan(remote, files, options)
        for line in [*table(plan, options.private), *vouched(Path(out))]:
            say(line)
        report = {"plan": asdict(plan), "commit": None, "verified": False, "tagged": None}
        report["pull_request"] = plan.pull_request
        if plan.is_done:
            where = plan.pull_request or f"`{plan.branch}` of {repo_id} at {plan.head}"
            say(f"nothing to do: {where} holds these files" + (f", tagged {options.tag}" if options.tag else ""))
            if options.tag or not options.execute:
                return report | {"commit": plan.commit, "verified": options.tag is not None, "tagged": options.tag}
            say("no tag says that this commit was verified, so it is verified now")
        elif not options.execute:
            say("this is the plan, and nothing was sent; add --execute to do it")
            return report
        return report | Push(remote, Path(out), files, plan, options, say).run()


def titled(out: Path, repo_id: str, files: dict[str, LocalFile], execute: bool, say: Say) -> dict[str, LocalFile]:
    """Has the card bear the repository's id where the plan is executed, unless the model was given a name of its own.

    The id of another repository, as an earlier push wrote, is no such name. Returns the files with that card.
    """
    path = out / CARD_NAME
    name = said(path)["model_name"] if is_own(path) else repo_id
    if name == repo_id or (name != named_after(out) and "/" not in name):
        return files
    say(
        f"the card is titled {name}, and will be titled {repo_id} on the Hub; `olmem card {out} --name NAME` gives it "
        "a title of its own"
    )
    if not execute:
        return files
    replace_text(path, make_card(said(path) | {"model_name": repo_id}, read_values(out, digests_of(files))))
    return files | read_all([path])


def digests_of(files: Mapping[str, LocalFile]) -> dict[str, str]:
    """The sha256 of each file by its name."""
    return {name: file.sha256 for name, file in files.items()}


def vouched(out: Path) -> Iterator[str]:
    """Yields what of the model was verified and what was not, for a person."""
    report = read_json(out / REPORT_NAME)
    is_native = report["kind"] == "native"
    what = (
        f"logits, weights and config are those of {report['source']}"
        if is_native
        else "the folder's own code computes what the installed olmem does"
    )
    yield f"{REPORT_NAME}, which nobody signs, says that {what}"
    yield "checked now: the code, the shapes and numbers of the weights, and every checksum"
    if not is_native:
        yield "not verified: what it was trained on or made from, for which its card vouches, and how good it is"


def find_token() -> str:
    """The token that huggingface_hub finds, which must be one that a header can carry."""
    token = get_token()
    if not token:
        raise CheckpointError("a token must be known to push (there is none); run `hf auth login`, or set HF_TOKEN.")
    if not (token.isascii() and token.isprintable()):
        raise CheckpointError(
            "the token must be of ASCII signs (it holds another, as pasting adds some); paste it again."
        )
    return token


def check_options(repo_id: str, options: PushOptions) -> None:
    """Raises CheckpointError for what no folder and no Hub could make right."""
    revision, create_pr, tag = options.revision, options.create_pr, options.tag
    try:
        validate_repo_id(repo_id)
        is_full = repo_id.count("/") == 1
    except HFValidationError:
        is_full = False
    if not is_full:
        raise CheckpointError(f"`REPO_ID` must be user/name or organization/name (got {repo_id!r}); write it so.")
    for name, value in (("revision", revision), ("tag", tag)):
        if value is not None and not REF_NAME.fullmatch(value):
            raise CheckpointError(f"`{name}` must be a name that git allows, as v1.0 (got {value!r}); choose another.")
    if create_pr and (tag or revision not in (None, MAIN)):
        other, value = ("tag", tag) if tag else ("revision", revision)
        raise CheckpointError(
            f"`{other}` must not be given with --create-pr (got {value!r}): a pull request is to `{MAIN}`, and what is "
            "tagged is what was merged; drop one of the two."
        )
