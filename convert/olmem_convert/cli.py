"""`olmem convert | verify | evaluate | card | push`: parses and calls."""

import atexit
import gc
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import CheckpointError, one_line
from .options import (
    CardOptions,
    ConvertOptions,
    EvaluateOptions,
    PushOptions,
    Say,
    VerifyOptions,
    read_settings,
)

app = typer.Typer(
    name="olmem",
    help="From a checkpoint of OLMo, OLMo-core, BakaLLM or Transformers to a verified Olmem model, and back.",
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
        typer.Option("--version", callback=show_version, is_eager=True, help="Print the version, and nothing else."),
    ] = False,
) -> None: ...


Source = Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the checkpoint, or a BakaLLM `.bin`.")]
NewFolder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it appears whole or not at all.")]
Folder = Annotated[Path, typer.Argument(metavar="OUT", help="A converted folder.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own by default.")]
ShardSize = Annotated[str, typer.Option(help="Largest weight file, such as 5GB.")]
Tokenizer = Annotated[
    Path | None, typer.Option(help="tokenizer.json or its folder; looked for in and beside SRC by default.")
]
Length = Annotated[int | None, typer.Option(min=1, help="Trained length in tokens, in place of SRC's own.")]
NativeConfig = Annotated[
    Path | None, typer.Option(help="Config file of a BakaLLM state dict; config.json beside it by default.")
]
Window = Annotated[
    int | None, typer.Option("--n-ctx", min=1, help="Window of a BakaLLM state dict without a config, in tokens.")
]
Activation = Annotated[
    str | None, typer.Option("--act-fn", help="Its activation: silu (001_pristine) or elephant (002_baka_elephant).")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Switch a memory on, as in retrieval_layers=[20]; repeatable."),
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Compare logits, weights and config with the native ones.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT, if Olmem wrote it.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on where it was killed; when stopped, keep what is finished.")
]
Nonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinite weights.")]
Growth = Annotated[
    bool, typer.Option("--allow-growth", help="Accept tensors that share their numbers, and more than double.")
]
To = Annotated[
    str | None, typer.Option(metavar="CLASS", help="Back to Transformers' olmo, olmo2 or olmo3; SRC is of Olmem.")
]
Against = Annotated[Path, typer.Option(metavar="SRC", help="The native checkpoint it was converted from.")]
Texts = Annotated[list[Path], typer.Option(metavar="FILE", help="Plain text in UTF-8; repeatable.")]
MaxTokens = Annotated[int | None, typer.Option(min=2, help="Of each text, its first so many tokens.")]
Seconds = Annotated[float | None, typer.Option(help="Time that reading the texts may take; no bound by default.")]
License = Annotated[
    str | None, typer.Option(help="The Hub's identifier of the weights' license, such as apache-2.0, or other.")
]
LicenseName = Annotated[str | None, typer.Option(help="Its name, with --license other.")]
LicenseLink = Annotated[
    str | None, typer.Option(help="Its address, or LICENSE, the file in OUT, with --license other.")
]
BaseModel = Annotated[
    str | None, typer.Option(metavar="REPO", help="The model on the Hub that this one was made from.")
]
Language = Annotated[
    list[str] | None, typer.Option(help="Language of its texts, as en, or code, or multilingual; repeatable.")
]
Dataset = Annotated[
    list[str] | None, typer.Option(metavar="REPO", help="Data set on the Hub that it was trained on; repeatable.")
]
Verified = Annotated[Path, typer.Argument(metavar="OUT", help="A converted and verified folder.")]
RepoId = Annotated[str, typer.Argument(metavar="REPO_ID", help="user/name or organization/name, of a model.")]
Revision = Annotated[str | None, typer.Option(help="Branch, created from main if need be; main by default.")]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="As a pull request to main.")]
Private = Annotated[bool, typer.Option("--private", help="Of a repository that is created.")]
Tag = Annotated[str | None, typer.Option(metavar="vX", help="Tag of the commit, once it is verified.")]
Execute = Annotated[bool, typer.Option("--execute", help="Do what is planned; else nothing is sent.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output, and nothing else.")]


@app.command()
def convert(
    source: Source,
    out: NewFolder,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    tokenizer: Tokenizer = None,
    max_length: Length = None,
    native_config: NativeConfig = None,
    n_ctx: Window = None,
    act_fn: Activation = None,
    settings: Settings = None,
    verify: Verify = True,
    overwrite: Overwrite = False,
    resume: Resume = False,
    allow_nonfinite: Nonfinite = False,
    allow_growth: Growth = False,
    to: To = None,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint and verify that its logits are the same."""
    run = imported("convert")

    def convert(say: Say) -> dict[str, Any]:
        options = ConvertOptions(
            dtype=dtype,
            max_shard_size=max_shard_size,
            tokenizer=tokenizer,
            max_length=max_length,
            native_config=native_config,
            n_ctx=n_ctx,
            act_fn=act_fn,
            memory=read_settings(settings or ()),
            verify=verify,
            overwrite=overwrite,
            resume=resume,
            allow_nonfinite=allow_nonfinite,
            allow_growth=allow_growth,
            to=to,
        )
        return run(source, out, options, say=say, tell=tell_script if as_json else None)

    finish(convert, as_json)


@app.command()
def verify(
    out: Folder,
    against: Against,
    native_config: NativeConfig = None,
    n_ctx: Window = None,
    act_fn: Activation = None,
    allow_nonfinite: Nonfinite = False,
    as_json: AsJson = False,
) -> None:
    """Compare the logits of a converted folder with the native checkpoint's, and write verification.json."""
    run = imported("verify")

    options = VerifyOptions(native_config=native_config, n_ctx=n_ctx, act_fn=act_fn, allow_nonfinite=allow_nonfinite)
    finish(lambda say: run(out, against, options, say=say), as_json)


@app.command()
def evaluate(
    out: Folder, text: Texts, max_tokens: MaxTokens = None, seconds: Seconds = None, as_json: AsJson = False
) -> None:
    """Measure the loss on plain texts, and write evaluation.json for the card to quote."""
    run = imported("evaluate")

    options, tell = EvaluateOptions(max_tokens=max_tokens, seconds=seconds), tell_script if as_json else None
    finish(lambda say: run(out, text, options, say=say, tell=tell), as_json)


@app.command()
def card(
    out: Folder,
    license: License = None,
    license_name: LicenseName = None,
    license_link: LicenseLink = None,
    base_model: BaseModel = None,
    language: Language = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
) -> None:
    """Write the model card from the folder's own files; what it was told before stays unless told anew."""
    run = imported("card")

    options = CardOptions(
        license=license,
        license_name=license_name,
        license_link=license_link,
        base_model=base_model,
        language=language or (),
        datasets=dataset or (),
    )
    finish(lambda say: run(out, options, say=say), as_json)


@app.command()
def push(
    out: Verified,
    repo_id: RepoId,
    revision: Revision = None,
    create_pr: CreatePr = False,
    private: Private = False,
    tag: Tag = None,
    execute: Execute = False,
    as_json: AsJson = False,
) -> None:
    """Show what of a verified folder would go to the Hub and, with --execute, publish it whole or not at all."""
    run = imported("push")

    options = PushOptions(revision=revision, create_pr=create_pr, private=private, tag=tag, execute=execute)
    finish(lambda say: run(out, repo_id, options, say=say), as_json)


def main() -> None:
    """Runs the command, and ends the process as soon as it has: to take apart all that torch has imported, which nobody
    needs any more, would take a second."""
    try:
        app()
    except SystemExit as end:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


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
