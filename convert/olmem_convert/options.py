"""What the commands are told: one frozen object for each, with the rules that need no checkpoint to be checked.

Nothing here takes long to import, so that the command line can read its options before it loads a model's library.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from .errors import CheckpointError, shortened

Say = Callable[[str], object]  # is told, line by line, what was found and done
DTYPES = ("float32", "bfloat16", "float16")
MODES = ("on", "off", "reset")  # of a memory
TASKS = ("passkey", "mqar", "niah_single_1", "niah_single_2", "qa1", "qa2", "qa3")  # of recall
SIZE = re.compile(r"0{0,9}[1-9]\d{0,17}([KMGT]B)?", re.IGNORECASE)
WORD = re.compile(r"[A-Za-z][\w:.-]*")
SHORT = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def silent(line: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the caller says of a checkpoint whose own files may not.

    Attributes:
        native_config: the config file of a BakaLLM state dict that has no config.json beside it.
        n_ctx: the window of a BakaLLM state dict without a config, in tokens.
        act_fn: its activation.
    """

    native_config: str | Path | None = None
    n_ctx: int | None = None
    act_fn: str | None = None

    @property
    def arguments(self) -> str:
        """The same as on the command line, with a space before each; empty when nothing is given."""
        given = {"--native-config": self.native_config, "--n-ctx": self.n_ctx, "--act-fn": self.act_fn}
        return "".join(f" {option} {quote(str(value))}" for option, value in given.items() if value is not None)


@dataclass(frozen=True, kw_only=True)
class OfNative(Given):
    """Options of commands that read a native checkpoint.

    Attributes:
        allow_nonfinite: NaN and infinite weights are carried over in place of being an error.
        revision: the branch, tag or commit of a checkpoint that is named by its id on the Hub; `main` by default.
    """

    allow_nonfinite: bool = False
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(OfNative):
    """Options of `convert`.

    Attributes:
        dtype: `float32`, `bfloat16` or `float16`, or `bf16` and the like; the checkpoint's own by default.
        max_shard_size: the largest size of a weight file.
        tokenizer: a tokenizer.json or a folder with one; it is looked for in and beside the checkpoint by default.
        max_length: the trained length in tokens, where it is not the config's.
        memory: fields of OlmemConfig that switch a memory on, as `{"num_memory_tokens": 16}`, with new parameters
            beside the converted ones. What is verified is the model with it off.
        verify: the result is compared with the checkpoint.
        overwrite: the folder is replaced, if it is an Olmem folder.
        resume: what is finished is kept when the conversion does not come to its end, and found by the next one.
        allow_growth: a model may have more than twice the bytes of its files, as one whose tensors share numbers has.
        to: the class of Transformers that an Olmem folder is converted back to: `olmo`, `olmo2` or `olmo3`.
    """

    dtype: str | None = None
    max_shard_size: int | str = "5GB"
    tokenizer: str | Path | None = None
    max_length: int | None = None
    memory: Mapping[str, Any] | None = None
    verify: bool = True
    overwrite: bool = False
    resume: bool = False
    allow_growth: bool = False
    to: str | None = None

    def __post_init__(self) -> None:
        """Raises CheckpointError for a value that no checkpoint could make right."""
        if not SIZE.fullmatch(str(self.max_shard_size)):
            raise CheckpointError(f"`max_shard_size` must be a size (got {self.max_shard_size!r}); write it as in 5GB.")
        object.__setattr__(self, "dtype", SHORT.get(str(self.dtype), self.dtype))
        if self.dtype is not None and self.dtype not in DTYPES:
            raise CheckpointError(f"`dtype` must be one of {', '.join(DTYPES)} (got {self.dtype!r}); choose one.")
        if self.tokenizer is not None and not Path(self.tokenizer).exists():
            raise CheckpointError(
                f"`tokenizer` must be a tokenizer.json or its folder ({self.tokenizer} does not exist); correct its "
                "path."
            )
        of_native = {
            "max_length": self.max_length,
            "native_config": self.native_config,
            "n_ctx": self.n_ctx,
            "act_fn": self.act_fn,
            "memory": dict(self.memory or {}) or None,
        }
        given = [name for name, value in of_native.items() if value is not None]
        if self.to is not None and given:
            raise CheckpointError(
                f"`{given[0]}` must be left out with `to` (got {of_native[given[0]]!r}); the Olmem folder says it."
            )


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(OfNative):
    """Options of `verify`, which must be those that `convert` was given, if it was converted."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of `evaluate`.

    Attributes:
        max_tokens: the number of first tokens of each text that are read, at least 2; all by default.
        chunk: the number of tokens that one call reads, which changes no figure.
        seconds: the time that measuring may take; there is no bound by default.
        memory: how each text is read: `on`, `off` or `reset`; by default all that there are where the model has a
            memory, else `on`.
        tasks: names of recall tasks, or `all`.
        distances: the tokens between what is asked for and the question; half a window, 2 and 8 windows by default.
        positions: the tokens before what is asked for; 0 and 2 windows by default.
        questions: the number of texts of a task at each distance and position.
        seed: the seed of these texts.
        state: the numbers of tokens at which the bytes of the state and the time of a token are measured.
    """

    max_tokens: int | None = None
    chunk: int = 512
    seconds: float | None = None
    memory: Sequence[str] = ()
    tasks: Sequence[str] = ()
    distances: Sequence[int] = ()
    positions: Sequence[int] = ()
    questions: int = 8
    seed: int = 0
    state: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Raises CheckpointError for a value that no model could make right."""
        if self.max_tokens is not None and self.max_tokens < 2:
            raise CheckpointError(
                f"`max_tokens` must be at least 2, of which one is predicted (got {self.max_tokens}); give more."
            )
        for name, values, least in (
            ("chunk", [self.chunk], 1),
            ("questions", [self.questions], 1),
            ("distance", self.distances, 0),
            ("position", self.positions, 0),
            ("state", self.state, 1),
        ):
            if any(value < least for value in values):
                raise CheckpointError(f"`{name}` must be at least {least} (got {min(values)}); give more.")
        if self.seconds is not None and not self.seconds > 0:
            raise CheckpointError(f"`seconds` must be positive (got {self.seconds}); leave it out for no bound.")
        for name, values, known in (("memory", self.memory, MODES), ("task", self.tasks, (*TASKS, "all"))):
            if wrong := [value for value in values if value not in known]:
                raise CheckpointError(f"`{name}` must be one of {', '.join(known)} (got {wrong[0]!r}); choose one.")


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """Options of `card`: what no file of the folder knows. What is not given stays as the card said it before.

    Attributes:
        name: the model's name, or the id of its repository on the Hub; the folder's name by default.
        origin: `scratch`, where the weights were trained from a random start, or `fine-tuned`, from `base_model`.
        license: the Hub's identifier of the weights' license, or `other`.
        license_name: its name, where `license` is `other`.
        license_link: its address, or LICENSE, the file in the folder, where `license` is `other`.
        base_model: the id of the model on the Hub that this one was made from.
        language: languages of its texts in ISO 639, as `en`, or `code`, or `multilingual`.
        datasets: ids of the data sets on the Hub that it was trained on.
    """

    name: str | None = None
    origin: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | None = None
    language: Iterable[str] = ()
    datasets: Iterable[str] = ()

    @property
    def given(self) -> dict[str, Any]:
        """What is given, by the names that a card has for it."""
        values = vars(self) | {"language": list(self.language), "datasets": list(self.datasets)}
        return {"model_name" if name == "name" else name: value for name, value in values.items() if value}


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Options of `push`.

    Attributes:
        revision: a branch, created from `main` where it does not exist; `main` by default.
        create_pr: the commit is a pull request to `main`.
        private: a repository that is created is private.
        tag: the tag of the commit, once it is verified.
        execute: what is planned is done; otherwise nothing is sent.
    """

    revision: str | None = None
    create_pr: bool = False
    private: bool = False
    tag: str | None = None
    execute: bool = False


def read_settings(texts: Iterable[str]) -> dict[str, Any]:
    """Reads each `FIELD=VALUE` of the command line, where VALUE is JSON, or a bare word, which is a string."""
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise CheckpointError(
                f"`--set` must be given FIELD=VALUE (got {text!r}); write it as in --set num_memory_tokens=16."
            )
        if name in settings:
            raise CheckpointError(
                f"`{name}` must be set once (got {json.dumps(settings[name])} and {value}); leave one of them out."
            )
        try:
            settings[name] = json.loads(value)
        except (ValueError, RecursionError) as error:
            if not WORD.fullmatch(value):
                raise CheckpointError(
                    f"`{name}` must be given as JSON or as a bare word (got {shortened(value)}); write it as in "
                    "--set retrieval_layers=[20] or --set retrieval_device=cpu."
                ) from error
            settings[name] = value
    return settings
