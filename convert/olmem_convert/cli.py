"""`olmem convert | verify | evaluate | card | push | serve`: parses and calls."""

import gc
import inspect
import json
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import CheckpointError, one_line
from .options import (
    TASKS,
    CardOptions,
    ConvertOptions,
    EvaluateOptions,
    PushOptions,
    Say,
    VerifyOptions,
    read_settings,
)

Tell = Callable[[dict[str, float | None]], object]  # is told figures, about once a second
KEYWORD = Parameter.KEYWORD_ONLY
app = typer.Typer(
    name="olmem",
    help="Convert checkpoints of OLMo, OLMo-core, BakaLLM and Transformers to verified Olmem models, and publish them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def show_version(asked: bool) -> None:
    """Prints the version and ends the command, if it was asked for."""
    if asked:
        typer.echo(f"olmem {version()}")
        raise typer.Exit


def version() -> str:
    """The version that `olmem` states, without the seconds that importing it takes."""
    spec = find_spec("olmem")
    text = Path(str(spec.origin)).read_text(encoding="utf-8") if spec else ""
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if not found:
        raise CheckpointError("the package olmem must state its version (it does not); install it anew.")
    return found[1]


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None: ...


BAKA = "Options of a BakaLLM state dict"
Source = Annotated[
    Path,
    typer.Argument(metavar="SRC", help="The checkpoint's folder, a BakaLLM `.bin`, or the id of a model on the Hub."),
]
SourceRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of SRC on the Hub; by default main.")]
NewFolder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write, completely or not at all.")]
Folder = Annotated[Path, typer.Argument(metavar="OUT", help="An Olmem folder that was converted or saved.")]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="float32, bfloat16 or float16 (or bf16, fp16); by default that of SRC."),
]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Size of the largest weight file.")]
Tokenizer = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="tokenizer.json or its folder; by default it is searched in and beside SRC."),
]
Length = Annotated[
    int | None, typer.Option(min=1, metavar="TOKENS", help="Trained length, instead of that in SRC's config.")
]
NativeConfig = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Its config; by default config.json beside it.", rich_help_panel=BAKA),
]
Window = Annotated[
    int | None,
    typer.Option("--n-ctx", min=1, metavar="TOKENS", help="Its window, if it has no config.", rich_help_panel=BAKA),
]
Activation = Annotated[
    str | None,
    typer.Option(
        "--act-fn",
        metavar="NAME",
        help="Its activation: silu (001_pristine) or elephant (002_baka_elephant).",
        rich_help_panel=BAKA,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Add a memory, as in retrieval_layers=[20]; repeatable."),
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Compare logits, weights and config with those of SRC.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if Olmem wrote it.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with an unfinished conversion; if stopped, keep the finished part.")
]
Nonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Accept weights that are NaN or infinite.")]
Growth = Annotated[
    bool, typer.Option("--allow-growth", help="Write a model of more than twice the size of SRC's files.")
]
To = Annotated[
    str | None,
    typer.Option(metavar="CLASS", help="Convert an Olmem folder back to Transformers' olmo, olmo2 or olmo3."),
]
Missing = Annotated[Path, typer.Argument(metavar="PATH", help="A tokenizer.json or its folder.")]
Against = Annotated[
    Path | None,
    typer.Option(metavar="SRC", help="The checkpoint that OUT was converted from; leave it out if OUT was trained."),
]
Texts = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="Measure perplexity on this text in UTF-8; repeatable.")
]
Modes = Annotated[
    list[str] | None,
    typer.Option(
        "--memory", metavar="MODE", help="Memory on, off, or reset at each window; by default all; repeatable."
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="NAME", help=f"Measure recall by {', '.join(TASKS)}, or all; repeatable."),
]
Distances = Annotated[
    list[int] | None,
    typer.Option("--distance", metavar="TOKENS", help="Tokens between a fact and its question; repeatable."),
]
Positions = Annotated[
    list[int] | None, typer.Option("--position", metavar="TOKENS", help="Tokens before the fact; repeatable.")
]
Questions = Annotated[int, typer.Option(min=1, help="Texts per task, distance and position.")]
Seed = Annotated[int, typer.Option(help="Seed of the texts of tasks.")]
Lengths = Annotated[
    list[int] | None,
    typer.Option(
        "--state",
        metavar="TOKENS",
        help="Measure the size of the state, and the time per token, after so many tokens; repeatable.",
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option(min=2, metavar="TOKENS", help="Read only so many first tokens of each text.")
]
Seconds = Annotated[float | None, typer.Option(help="Stop after this time; by default there is no limit.")]
Name = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Name of the model, or its id on the Hub; by default the name of OUT."),
]
Origin = Annotated[str | None, typer.Option(metavar="HOW", help="How the weights were trained: scratch or fine-tuned.")]
License = Annotated[
    str | None, typer.Option(help="License of the weights, by the Hub's identifier, such as apache-2.0 or other.")
]
LicenseName = Annotated[str | None, typer.Option(help="Name of the license, with --license other.")]
LicenseLink = Annotated[
    str | None, typer.Option(help="Address of the license, or LICENSE for that file in OUT, with --license other.")
]
BaseModel = Annotated[
    str | None, typer.Option(metavar="REPO", help="The model on the Hub from which this one was made.")
]
Language = Annotated[
    list[str] | None, typer.Option(help="Language of the training texts, such as en, code or multilingual; repeatable.")
]
Dataset = Annotated[
    list[str] | None,
    typer.Option("--dataset", metavar="REPO", help="Data set on the Hub that the model was trained on; repeatable."),
]
Verified = Annotated[Path, typer.Argument(metavar="OUT", help="An Olmem folder that was verified.")]
RepoId = Annotated[
    str, typer.Argument(metavar="REPO_ID", help="Id of the model on the Hub: user/name or organization/name.")
]
Revision = Annotated[
    str | None, typer.Option(help="Branch to push to, which is made if it does not exist; by default main.")
]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request to main.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
Tag = Annotated[str | None, typer.Option(metavar="vX", help="Tag the commit after it is verified.")]
Execute = Annotated[bool, typer.Option("--execute", help="Do what is planned. Without it, nothing is sent.")]
Served = Annotated[str, typer.Argument(metavar="OUT", help="A converted folder, or a repository on the Hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print only a report as JSON on standard output.")]


# The option of the command line that each field of an options class becomes.
OPTIONS = {
    "dtype": Dtype,
    "max_shard_size": ShardSize,
    "tokenizer": Tokenizer,
    "max_length": Length,
    "memory": Settings,
    "verify": Verify,
    "overwrite": Overwrite,
    "resume": Resume,
    "allow_nonfinite": Nonfinite,
    "allow_growth": Growth,
    "to": To,
    "native_config": NativeConfig,
    "n_ctx": Window,
    "act_fn": Activation,
    "revision": SourceRevision,
    "max_tokens": MaxTokens,
    "tasks": Tasks,
    "distances": Distances,
    "positions": Positions,
    "questions": Questions,
    "seed": Seed,
    "state": Lengths,
    "seconds": Seconds,
    "name": Name,
    "origin": Origin,
    "license": License,
    "license_name": LicenseName,
    "license_link": LicenseLink,
    "base_model": BaseModel,
    "language": Language,
    "datasets": Dataset,
    "create_pr": CreatePr,
    "private": Private,
    "tag": Tag,
    "execute": Execute,
}
# Those that mean something else to a command.
OF_COMMANDS = {EvaluateOptions: {"memory": Modes}, PushOptions: {"revision": Revision}}


def with_options(command: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Has a command take each field of its `options` as an option of the command line, and --json.

    It is given the options as one object, `say`, and `tell`, and returns its report.
    """
    own = inspect.signature(command).parameters
    kind = own["options"].annotation
    # What may be given several times is None where it is not.
    several = {field.name: tuple for field in fields(kind) if field.default == ()}
    several |= {"memory": read_settings} if kind is ConvertOptions else {}
    defaults = {field.name: None if field.name in several else field.default for field in fields(kind)}
    annotations = OPTIONS | OF_COMMANDS.get(kind, {})
    names = [name for name in annotations if name in defaults]
    taken = [own[name] for name in own if name not in ("options", "say", "tell")]
    taken += [Parameter(name, KEYWORD, annotation=annotations[name], default=defaults[name]) for name in names]
    taken.append(Parameter("as_json", KEYWORD, annotation=AsJson, default=False))

    def taking(as_json: bool, **values: Any) -> None:
        imported(command.__name__)

        def run(say: Say) -> dict[str, Any]:
            given = {name: values.pop(name) for name in names}
            given |= {name: several[name](given[name] or ()) for name in names if name in several}
            return command(**values, options=kind(**given), say=say, tell=tell_script if as_json else None)

        finish(run, as_json)

    made: Any = taking
    made.__name__, made.__doc__ = command.__name__, command.__doc__
    made.__signature__ = inspect.Signature([parameter.replace(kind=KEYWORD) for parameter in taken])
    made.__annotations__ = {parameter.name: parameter.annotation for parameter in taken}
    return made


@app.command()
@with_options
def convert(source: Source, out: NewFolder, options: ConvertOptions, say: Say, tell: Tell | None) -> dict[str, Any]:
    """Convert a checkpoint and verify that its logits are the same."""
    return imported("convert")(source, out, options, say=say, tell=tell)


@app.command()
@with_options
def verify(out: Folder, options: VerifyOptions, say: Say, tell: Tell | None, against: Against = None) -> dict[str, Any]:
    """Compare a folder with the checkpoint that it was converted from, or check a model that was trained."""
    return imported("verify")(out, against, options, say=say)


@app.command()
@with_options
def evaluate(out: Folder, options: EvaluateOptions, say: Say, tell: Tell | None, text: Texts = None) -> dict[str, Any]:
    """Measure perplexity, recall and state, and write figures and plots for the model card."""
    return imported("evaluate")(out, text or (), options, say=say, tell=tell)


@app.command()
def tokenizer(out: Folder, tokenizer: Missing, as_json: AsJson = False) -> None:
    """Add a tokenizer to a converted folder that has none."""
    run = imported("add_tokenizer")

    finish(lambda say: run(out, tokenizer, say=say), as_json)


@app.command()
@with_options
def card(out: Folder, options: CardOptions, say: Say, tell: Tell | None) -> dict[str, Any]:
    """Write the model card from the folder's files and these options, which stay until they are changed."""
    return imported("card")(out, options, say=say)


@app.command()
@with_options
def push(out: Verified, repo_id: RepoId, options: PushOptions, say: Say, tell: Tell | None) -> dict[str, Any]:
    """Show what a push of a verified folder would change on the Hub, or do it with --execute."""
    return imported("push")(out, repo_id, options, say=say)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def serve(context: typer.Context, source: Served) -> None:
    """Serve a model by Transformers' server, with all options of `transformers serve`."""
    run = imported("serve")

    finish(lambda say: run(source, context.args, say=say), False)


def imported(name: str) -> Callable[..., dict[str, Any]]:
    """The command of this name. What is imported for it stays, so none of it is looked through for garbage."""
    gc.disable()
    try:
        return getattr(import_module(str(__package__)), name)
    finally:
        gc.enable()


def tell_script(figures: dict[str, float | None]) -> None:
    typer.echo(json.dumps({"progress": figures}), err=True)


def finish(run: Callable[[Say], dict[str, Any]], as_json: bool) -> None:
    """Runs a verb: its lines to the user, its report to a script, its error in one line and exit code 1."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stopped conversion cleans up
    quiet_libraries()
    try:
        report = run(lambda line: typer.echo(one_line(line), err=as_json))
    except CheckpointError as error:
        typer.echo(f"error: {error}", err=True)  # whose lines are none of a checkpoint's
        raise typer.Exit(1) from None
    except BrokenPipeError:
        raise  # typer ends quietly then
    except (OSError, MemoryError, RuntimeError) as error:  # torch says RuntimeError when memory is short
        said = str(error).strip().splitlines()[:1] or ["not enough memory"]
        typer.echo(one_line(f"error: {said[0]}"), err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(report))


def quiet_libraries() -> None:
    """Keeps Transformers' warnings and bars, which may repeat what a checkpoint says, off the terminal."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
