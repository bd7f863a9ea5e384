"""What a push would do: the folder compared with a branch of the Hub, as one commit has it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from tqdm import tqdm

from ..errors import CheckpointError
from ..options import PushOptions
from .release import LocalFile
from .remote import Refs, Remote, differences

MAIN = "main"
TITLE = "Model verified by olmem"


@dataclass(frozen=True)
class Plan:
    """What a push would do. Files by name, with their bytes; `head` is the commit that it was made against."""

    repo_id: str
    branch: str
    head: str | None
    creates_repo: bool
    creates_branch: bool
    new: dict[str, int]
    changed: dict[str, int]
    unchanged: dict[str, int]
    deleted: dict[str, int]
    upload: int
    create_pr: bool
    commit: str | None  # that holds these files already, on the branch or in the pull request
    pull_request: str | None
    tag: str | None
    tag_exists: bool

    @property
    def touched(self) -> list[str]:
        """Returns the names of all files that the commit would change."""
        return sorted([*self.new, *self.changed, *self.deleted])

    @property
    def is_done(self) -> bool:
        """The branch, or a pull request to it, holds just these files, and so does the tag."""
        return self.commit is not None and (self.tag is None or self.tag_exists)


def make_plan(remote: Remote, files: Mapping[str, LocalFile], options: PushOptions) -> Plan:
    """Compares the files with the head of the branch, or of `main` where there is no such branch yet."""
    repo_id, refs, branch, tag = remote.repo_id, remote.refs(), options.revision or MAIN, options.tag
    if refs is None and not options.create_pr:
        remote.check_namespace()
    branches, tags = (refs.branches, refs.tags) if refs else ({}, {})
    head = branches.get(branch) or branches.get(MAIN)
    check_refs(remote, refs, options)
    tree = remote.tree(head) if head else {}
    if ".gitignore" in tree:
        raise CheckpointError(
            f"`.gitignore` must not be on `{branch}` of {repo_id}, as the Hub leaves out files by it (it is); "
            "remove it there first."
        )
    found = differences(files, tree)
    plan = Plan(
        repo_id=repo_id,
        branch=branch,
        head=head,
        creates_repo=refs is None,
        creates_branch=refs is not None and branch not in branches,
        **found,
        upload=sum(found["new"].values()) + sum(found["changed"].values()),
        create_pr=options.create_pr,
        commit=None,
        pull_request=None,
        tag=tag,
        tag_exists=tag in tags,
    )
    if tag in tags and (tags[tag] != head or plan.touched):
        raise CheckpointError(
            f"`tag` must be new, or name the commit that holds these files (the tag {tag} of {repo_id} names "
            f"{tags[tag]}); choose another: what was released stays."
        )
    if not (plan.touched or plan.creates_branch):
        return replace(plan, commit=head)
    if plan.create_pr and (made := find_pull_request(remote, files)):
        return replace(plan, commit=made[0], pull_request=made[1])
    return plan


def check_refs(remote: Remote, refs: Refs | None, options: PushOptions) -> None:
    """Raises CheckpointError unless the repository, as it is, can take what is to be pushed."""
    repo_id, branch, tag = remote.repo_id, options.revision or MAIN, options.tag
    branches, tags = (refs.branches, refs.tags) if refs else ({}, {})
    if refs and not {branch, MAIN} & set(branches):
        raise CheckpointError(f"`{repo_id}` must have a branch {MAIN} (it has {sorted(branches)}); create it.")
    if options.create_pr and refs is None:
        raise CheckpointError(
            f"`REPO_ID` must exist for a pull request ({repo_id} does not, or is hidden from this token); push without "
            "--create-pr."
        )
    if branch in tags or tag in branches or tag == branch:
        raise CheckpointError(
            f"`{branch if branch in tags else tag}` must not name both a branch and a tag of {repo_id} (it would); "
            "choose another name."
        )
    if options.private and refs and not remote.is_private():
        raise CheckpointError(
            f"`private` is of a repository that is created ({repo_id} exists and is public); change it in its settings "
            "first, or drop --private."
        )


def find_pull_request(remote: Remote, files: Mapping[str, LocalFile]) -> tuple[str, str] | None:
    """Commit and address of an open pull request that an earlier push made of these files."""
    for commit, url in remote.pull_requests(TITLE):
        found = differences(files, remote.tree(commit))
        if not (found["new"] or found["changed"] or found["deleted"]):
            return commit, url
    return None


def table(plan: Plan, private: bool) -> Iterator[str]:
    """The plan, for a person: what is touched by name, and how much else there is."""
    if plan.creates_repo:
        yield f"creates {plan.repo_id}, {'private' if private else 'public'}, branch {plan.branch}"
    elif plan.creates_branch:
        yield f"creates branch {plan.branch} of {plan.repo_id} at {plan.head}, the head of {MAIN}"
    else:
        yield f"{'pull request to ' * plan.create_pr}branch {plan.branch} of {plan.repo_id}, now at {plan.head}"
    kinds = {"new": plan.new, "changed": plan.changed, "deleted": plan.deleted}
    lines = [(kind, *line) for kind, named in kinds.items() for line in with_code_as_one(named)]
    width = max((len(name) for _, name, _ in lines), default=0)
    for kind, name, size in lines:
        yield f"  {kind:<7}  {name:<{width}}  {shown(size):>8}"
    counts = (kinds | {"unchanged": plan.unchanged}).items()
    yield f"{', '.join(f'{len(named)} {kind}' for kind, named in counts)}; {shown(plan.upload)} to upload"
    if "tokenizer.json" not in plan.new | plan.changed | plan.unchanged:
        yield "note: there is no tokenizer, so nobody can give it text: `olmem tokenizer OUT PATH` adds one"
    if plan.tag:
        yield f"tag {plan.tag}: {'is there, at this commit' if plan.tag_exists else 'after verification'}"


def with_code_as_one(named: Mapping[str, int]) -> list[tuple[str, int]]:
    """Returns names and sizes in order, where several files of the model's code are one."""
    code = [name for name in named if name.endswith("_olmem.py")]
    if len(code) < 3:
        return sorted(named.items())
    others = sorted((name, size) for name, size in named.items() if name not in code)
    return [(f"*_olmem.py, {len(code)} files of code", sum(named[name] for name in code)), *others]


def shown(size: int) -> str:
    """Returns a size in the unit that fits it."""
    return f"{size} B" if size < 1000 else tqdm.format_sizeof(size) + "B"
