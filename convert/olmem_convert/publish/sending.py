"""A plan carried out: one commit, verified on the Hub as it is sent from there, and tagged.

What the Hub says of its files is compared, and so is what it sends, before any of it is imported. The process that
imports it has neither the token nor the network.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.file_download import repo_folder_name

from ..errors import CheckpointError
from ..options import PushOptions, Say
from ..reading.olmem_folder import REPORT_NAME
from ..reading.texts import read_json
from .planning import MAIN, TITLE, Plan, find_pull_request, make_plan
from .release import LocalFile, require_same
from .reloading import check_loaded, run_tasks, task_of
from .remote import NETWORK_ERRORS, Remote, differences, persistently


@dataclass
class Push:
    """A plan that is being carried out."""

    remote: Remote
    folder: Path
    files: Mapping[str, LocalFile]
    plan: Plan
    options: PushOptions
    say: Say
    created: list[str] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Carries the plan out, from the logits of OUT to the tag. Returns what came of it."""
        pull_request = None
        with self.remote.telling(self.state):
            self.say("computing the logits of the prompt in verification.json, with the installed olmem")
            expected = self.logits(installed=True, commit=None)
            self.create()
            if self.plan.commit:
                commit, pull_request = self.plan.commit, self.plan.pull_request
            elif self.plan.touched:
                commit, pull_request = self.commit()
                self.say(f"committed {commit}" + (f" as {pull_request}" if pull_request else ""))
            else:
                commit = str(self.plan.head)
        with self.after(commit):
            self.check_checksums(commit)
            self.say(f"verified: the checksums of {len(self.files)} files as the Hub lists them, at {commit}")
            self.say("downloading this commit, and loading it with the repository's own code, without token or network")
            if self.logits(installed=False, commit=commit) != expected:
                raise CheckpointError("the logits of the model on the Hub are not those of OUT, bit for bit")
            self.say("verified: the same logits, bit for bit")
            if self.plan.tag:
                self.tag(commit, self.plan.tag)
                self.say(f"tagged {self.plan.tag}")
            place = self.plan.tag or (self.plan.branch if self.plan.branch != MAIN else None)
            page = f"{self.remote.api.endpoint}/{self.plan.repo_id}" + (f"/tree/{place}" if place else "")
            self.say(f"published: {pull_request or self.remote.without_token(page)}")
            if not pull_request:
                at = f", revision={place!r}" if place else ""
                self.say(
                    f"next: `AutoModelForCausalLM.from_pretrained({self.plan.repo_id!r}{at}, trust_remote_code=True)`"
                )
        return {"commit": commit, "pull_request": pull_request, "verified": True, "tagged": self.plan.tag}

    def create(self) -> None:
        """The repository and the branch, if the plan has them created; the plan is then that of what was created."""
        plan, remote = self.plan, self.remote
        if plan.creates_repo:
            persistently(remote.api.create_repo, plan.repo_id, private=self.options.private, exist_ok=True)
            self.created.append(plan.repo_id)
            persistently(remote.api.list_repo_refs, plan.repo_id, also=(404,))  # which it may be until all of it knows
            self.plan = make_plan(remote, self.files, self.options)
            if others := [*self.plan.deleted, *self.plan.changed, *self.plan.unchanged]:
                raise CheckpointError(
                    f"`{plan.repo_id}` must be empty, as it did not exist when this was planned (it holds "
                    f"{others[0]}): somebody else has created it; nothing of this push was committed: run it again."
                )
        if self.plan.creates_branch:
            head = str(self.plan.head)
            persistently(remote.api.create_branch, plan.repo_id, branch=plan.branch, revision=head, exist_ok=True)
            self.created.append(f"branch {plan.branch}")
            self.say(f"created branch {plan.branch}")
            self.made_since()

    def commit(self) -> tuple[str, str | None]:
        """The commit on the planned head, and the pull request's address; made once, whatever happens on the way."""
        plan = self.plan
        operations: list[Any] = [
            CommitOperationAdd(name, self.files[name].path) for name in sorted([*plan.new, *plan.changed])
        ]
        operations += [CommitOperationDelete(name) for name in sorted(plan.deleted)]
        require_same(self.files)

        def create() -> tuple[str, str | None]:
            made = self.remote.api.create_commit(
                plan.repo_id,
                operations,
                commit_message=TITLE,
                commit_description=f"{len(plan.new)} new, {len(plan.changed)} changed, {len(plan.deleted)} deleted",
                revision=plan.branch,
                parent_commit=plan.head,
                create_pr=plan.create_pr,
            )
            return made.oid, made.pr_url

        return persistently(create, made=self.made_since)

    def made_since(self) -> tuple[str, str | None] | None:
        """The commit on the planned head that holds these files, if it was made after all. An error when the branch has
        moved otherwise."""
        plan, remote = self.plan, self.remote
        if plan.create_pr and (made := find_pull_request(remote, self.files)):
            return made
        head = remote.head(plan.branch)
        if head == plan.head:
            return None
        since = remote.commits_since(plan.branch, plan.head)
        if since and not plan.create_pr:
            found = differences(self.files, remote.tree(since[-1].commit_id))
            if not (found["new"] or found["changed"] or found["deleted"]):
                return since[-1].commit_id, None
        before, after = (
            {name: file.blob_id for name, file in remote.tree(str(at)).items()} for at in (plan.head, head)
        )
        changed = sorted(name for name in before | after if before.get(name) != after.get(name))
        by = "; ".join(f"{commit.commit_id} {commit.title!r} by {', '.join(commit.authors)}" for commit in since)
        raise CheckpointError(
            f"`{plan.branch}` of {plan.repo_id} must stay at {plan.head} while it is pushed to (it is at {head} now, "
            f"by {by or 'another history'}; files changed: {', '.join(changed) or 'none'}); nothing of this push was "
            "committed: run it without --execute for a plan on top of that."
        )

    def check_checksums(self, commit: str) -> None:
        """The Hub's files, as listed, are those that were checked here before anything was sent."""
        found = differences(self.files, self.remote.tree(commit, also=(404,)))
        wrong = {kind: sorted(found[kind]) for kind in ("new", "changed", "deleted") if found[kind]}
        if wrong:
            words = {"new": "missing", "changed": "different", "deleted": "extra"}
            text = "; ".join(f"{words[kind]}: {', '.join(names)}" for kind, names in wrong.items())
            raise CheckpointError(f"the Hub's checksums are not those of OUT ({text})")

    def tag(self, commit: str, tag: str) -> None:
        """Tags the commit. An answer that was lost on the way is no error if the tag is there."""
        try:
            persistently(self.remote.api.create_tag, self.plan.repo_id, tag=tag, revision=commit)
        except NETWORK_ERRORS:
            refs = self.remote.refs()
            if refs is None or refs.tags.get(tag) != commit:  # it was made, and the answer lost
                raise

    def logits(self, installed: bool, commit: str | None) -> str:
        """The checksum of the logits, in a process of its own: of OUT with the installed olmem, or of the repository at
        this commit by its own code, once what was downloaded is known to be OUT's, bit for bit."""
        claimed = read_json(self.folder / REPORT_NAME)
        with tempfile.TemporaryDirectory(prefix="olmem-") as scratch:
            self.check_room(scratch)
            if commit is not None:
                self.download(commit, Path(scratch))
            model = str(self.folder) if installed else self.plan.repo_id
            task = task_of(model, self.folder, claimed["prompt"], installed, scratch, self.say, revision=commit)
            report = self.reload(task, scratch)
        check_loaded(report, installed, finite=not claimed["nonfinite"])
        return report["logits"]

    def download(self, commit: str, home: Path) -> None:
        """Lays the commit's files where huggingface_hub would keep them, each compared with the one of OUT."""
        snapshot = home / "hub" / repo_folder_name(repo_id=self.plan.repo_id, repo_type="model") / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for name, file in self.files.items():
            self.remote.download(name, commit, snapshot / name, file)
        self.say(f"verified: the {len(self.files)} files that the Hub sends are those of OUT, bit for bit")

    def reload(self, task: dict[str, Any], scratch: str) -> dict[str, Any]:
        """Runs the task away from the user's caches, without the token and without the network."""
        try:
            (report,) = run_tasks([task], scratch, self.remote.token)
        except CheckpointError as error:
            sent = "" if task["revision"] else "; nothing was sent"
            raise CheckpointError(f"{str(error).rstrip('.')}{sent}.") from None
        return report

    def check_room(self, scratch: str) -> None:
        """Raises CheckpointError if the model that is to be downloaded does not fit on the disk."""
        needed = sum(file.size for name, file in self.files.items() if name.endswith(".safetensors"))
        free = shutil.disk_usage(scratch).free
        if free < needed:
            raise CheckpointError(
                f"`TMPDIR` must have room for the model, {needed:,} bytes, to load it from the Hub ({scratch} has "
                f"{free:,} free); set TMPDIR to another disk."
            )

    def state(self) -> str:
        """What a push that failed before its commit has left."""
        try:
            head = self.remote.head(self.plan.branch)
        except NETWORK_ERRORS:
            return "the Hub does not say whether anything changed: run it again, which goes on from what is there"
        if self.created:
            return f"{' and '.join(self.created)} was created and holds nothing of this push: run it again"
        expected = None if self.plan.creates_repo or self.plan.creates_branch else self.plan.head
        if head != expected:
            return f"`{self.plan.branch}` is at {head} now: run it again"
        return "the remote is unchanged: run it again"

    @contextmanager
    def after(self, commit: str) -> Iterator[None]:
        """Says of what fails now that the commit is there, and no tag."""
        try:
            yield
        except (CheckpointError, *NETWORK_ERRORS) as error:
            why = str(error).rstrip(".") if isinstance(error, CheckpointError) else self.remote.explain(error)
            place, way_out = (
                f"on `{self.plan.branch}`",
                "run it again with --tag, which sends what differs and verifies",
            )
            if self.plan.create_pr:
                place, way_out = "in a pull request", "close it, and run it again"
            raise CheckpointError(
                f"commit {commit} is {place} of {self.plan.repo_id}, but not verified and not tagged: {why}; {way_out}."
            ) from None
