"""What an Olmem folder's model predicts, recalls and holds, measured by the metrics in `metrics`, and written down.

An evaluation is parts: a text in one way of reading it, a task at one distance and position, the state. Each is kept in
a journal beside the folder once it is measured, where a next run finds it, if neither the model nor what was asked for
has changed. It stays when a run is stopped or a part cannot be measured, as a run that leaves that part out goes on.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import olmem
import torch
import transformers
from olmem import OlmemConfig
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..options import EvaluateOptions, Say, silent
from ..proof.loading import load
from ..publish.model_card import config_values, digests, verification_values, write_card
from ..publish.standing_card import is_own, kept_metadata
from ..reading.olmem_folder import (
    CARD_NAME,
    EVALUATION_NAME,
    MOST_TEXTS,
    PLOT_NAMES,
    identities,
    require_unchanged,
    stored_dtype,
)
from ..reading.texts import read_json
from ..reading.tokenizer_file import quiet_panics
from ..writing.progress import Progress, Tell
from ..writing.texts import replace_bytes, replace_text, require_replaceable
from .next_steps import to_publish

NEEDED = ("evaluate", "matplotlib")
PERSONAL = ("_interpreter_path", "_git_commit_hash")  # of what `evaluate.save` adds: it is of this machine, not of OUT
Advance = Callable[[int], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Something that is measured in one go.

    Attributes:
        group: the list of evaluation.json that its rows are in.
        settings: what decides its figures, beside the model.
        tokens: the number of tokens that it reads, more or less.
        measure: computes its rows.
    """

    group: str
    settings: dict[str, Any]
    tokens: int
    measure: Callable[[Advance], list[Row]]


def evaluate(
    out: str | Path,
    texts: Sequence[str | Path] = (),
    options: EvaluateOptions | None = None,
    *,
    say: Say = silent,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Measures the model of the Olmem folder `out`, and writes evaluation.json, plots and the card.

    `texts` are UTF-8 files, each read as one stream; `options` name tasks of recall, and lengths of the state. The
    model runs in the dtype of its weights, on a CUDA device if there is one. `tell` is told how far reading has come,
    about once a second, in place of a progress bar. An evaluation that is stopped goes on when it is run again, and one
    that could not measure a task or a text, when it is run without it.

    Returns what evaluation.json holds: `texts`, `recall` and `state`, by the names of the metrics in `metrics`, and
    what computed them.

    Raises:
        CheckpointError: when a text or the folder is not fit for it. Nothing is written into the folder then.
    """
    options = options or EvaluateOptions()
    out, paths = Path(out), [Path(text) for text in texts]
    if not (out / "config.json").is_file():
        raise CheckpointError(f"`OUT` must be a converted folder ({out} has no config.json); convert SRC first.")
    check_texts(paths, options)
    require_libraries()
    require_replaceable(out / name for name in (CARD_NAME, EVALUATION_NAME, *sorted(PLOT_NAMES)))
    from .measuring import Measured  # imports `evaluate`, which takes seconds

    before, made_of = identities(out), digests(out, {})
    verified = verification_values(out, made_of)
    config: OlmemConfig = config_values(out, {})["config"]
    kept = kept_metadata(out)
    measured = Measured(out, config, paths, options)
    model = load(out, stored_dtype(out))
    if torch.cuda.is_available():
        model.to(device=torch.device("cuda"))  # pyright: ignore[reportCallIssue]  which loses `self`
    run = run_of(model)
    journal = Journal(out, {"sha256": made_of, **run})
    found = measure(measured.parts(model), journal, options, say, tell)
    require_unchanged(before, "it is evaluated")
    report = {
        **measured.report(found),
        "max_tokens": options.max_tokens,
        "memory": config.has_memory,
        **run,
        "sha256": made_of,
    }
    report = write(out, report)
    journal.remove()
    for line in measured.lines(report):
        say(line)
    if is_own(out / CARD_NAME):
        write_card(out, kept, made_of)
    elif (out / CARD_NAME).exists():
        say(f"note: {out / CARD_NAME} is your own, so it was not changed")
    say(f"wrote {out / EVALUATION_NAME}")
    say(to_publish(out, kept, verified))
    return report


def check_texts(paths: Sequence[Path], options: EvaluateOptions) -> None:
    """Raises CheckpointError unless something is to be measured, and each text has a name of its own."""
    names = [path.name for path in paths]
    if not (names or options.tasks or options.state):
        raise CheckpointError(
            "`text` must be given, or a task or lengths of the state (got none); add --text FILE, --task NAME or "
            "--state TOKENS."
        )
    if options.memory and not names:
        raise CheckpointError(
            f"`memory` must be given with a text, as it says how one is read (got {', '.join(options.memory)} and no "
            "text); add --text FILE, or leave it out."
        )
    if len(set(names)) < len(names):
        raise CheckpointError(
            f"`text` must be given files that each have a name of its own (got {', '.join(names)}); rename one."
        )
    if len(names) > MOST_TEXTS:
        raise CheckpointError(
            f"`text` must be given at most {MOST_TEXTS:,} times (got {len(names):,}); put several texts into one file."
        )


def require_libraries() -> None:
    """Raises CheckpointError unless all is there that an evaluation needs beside the package's own dependencies."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise CheckpointError(
            f"`{missing[0]}` must be installed to evaluate (it is not); run `pip install 'olmem[evaluate]'`."
        )
    if shutil.which("git") is None:
        raise CheckpointError(
            "`git` must be installed to evaluate, as `evaluate.save` calls it (there is none in PATH); install it."
        )


def run_of(model: PreTrainedModel) -> dict[str, Any]:
    """What computes the figures."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "device": model.device.type,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "olmem": olmem.__version__},
    }


# Parts, one after the other


class Journal:
    """The rows of finished parts, in a file beside OUT, until the evaluation is written.

    A part is found again by all that decides its figures: the folder's files, what computes them, and its settings.
    """

    def __init__(self, out: Path, of: dict[str, Any]):
        path = out.resolve()
        self.path, self.of = path.with_name(f".{path.name}.evaluation.json"), of
        self.rows: dict[str, list[Row]] = {}

    def open(self, parts: Sequence[Part]) -> int:
        """Reads what is finished of these parts, and returns how many are."""
        if self.path.is_file():
            keys = {self.key(part) for part in parts}
            self.rows = {key: rows for key, rows in read_json(self.path).items() if key in keys}
        return len(self.rows)

    def key(self, part: Part) -> str:
        """Returns what a part is found again by."""
        text = json.dumps([self.of, part.group, part.settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def keep(self, part: Part, rows: list[Row]) -> None:
        """Writes down a part's rows."""
        self.rows[self.key(part)] = rows
        replace_text(self.path, json.dumps(self.rows))

    def remove(self) -> None:
        """Removes the file, if there is one."""
        self.path.unlink(missing_ok=True)


def measure(
    parts: Sequence[Part], journal: Journal, options: EvaluateOptions, say: Say, tell: Tell | None
) -> dict[str, list[Row]]:
    """Returns the rows of each group, of parts that are finished already or now."""
    finished, started = journal.open(parts), time.monotonic()
    if finished:
        say(f"note: {finished} of {len(parts)} parts were measured by an earlier run")
    found: dict[str, list[Row]] = {}
    left = sum(part.tokens for part in parts if journal.key(part) not in journal.rows)
    with Progress(left, "evaluating", tell, unit="token") as bar:

        def advance(tokens: int) -> None:
            bar.update(tokens)
            if options.seconds is not None and time.monotonic() - started > options.seconds:
                raise CheckpointError(
                    f"`seconds` must suffice to measure (got {options.seconds:g}, in which {bar.n:,} of {bar.total:,} "
                    "tokens were read); give more, or fewer tokens with --max-tokens. What is finished is kept."
                )

        for part in parts:
            if journal.key(part) not in journal.rows:
                journal.keep(part, part.measure(advance))
            found.setdefault(part.group, []).extend(journal.rows[journal.key(part)])
    return found


# What is written


def write(out: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Writes evaluation.json and plots, and returns what that holds."""
    import evaluate as library

    from .plotting import draw

    plots = draw(report)
    report = report | {"plots": {name: hashlib.sha256(content).hexdigest() for name, content in plots.items()}}
    with tempfile.TemporaryDirectory() as scratch:
        with quiet_panics():  # git's "not a git repository"
            path = library.save(Path(scratch) / EVALUATION_NAME, **report)
        saved = {name: value for name, value in json.loads(path.read_text()).items() if name not in PERSONAL}
    replace_text(out / EVALUATION_NAME, json.dumps(saved, indent=2) + "\n")
    for name, content in plots.items():
        replace_bytes(out / name, content)
    for name in PLOT_NAMES - plots.keys():
        (out / name).unlink(missing_ok=True)
    return saved
