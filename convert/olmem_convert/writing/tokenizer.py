"""The tokenizer of a converted folder: the native tokenizer.json byte for byte, under a class that keeps its ids.

Transformers 5 rebuilds the splitting rule when `tokenizer_class` names a model's own class (`GPT2TokenizerFast`,
`GPTNeoXTokenizerFast`), and digits and newlines then get other ids than the model was trained on. The generic class
takes tokenizer.json as it stands. What was written is loaded again and compared with the source.
"""

import json
import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedConfig

from ..errors import CheckpointError
from ..options import Say
from ..reading.fields import TOKEN_IDS, tokens_of
from ..reading.olmem_folder import COMPANIONS
from ..reading.plain import require_own
from ..reading.texts import read_json, read_text, refuse_code
from ..reading.tokenizer_file import (
    CLASSES,
    TOKENIZER_CLASS,
    WAY_OUT,
    names_files,
    quiet_panics,
    read_companion,
    read_tokenizer,
    read_tokenizer_config,
    refusing,
)
from ..reading.tokenizer_trial import texts_for


def find_tokenizer(checkpoint: Path) -> Path | None:
    """The tokenizer.json in the checkpoint, in its tokenizer/, beside it or in tokenizer/ beside it, in this order."""
    folder = Path(os.path.abspath(checkpoint))
    for parent in (folder, folder.parent):
        for place in (parent, parent / "tokenizer"):
            if os.path.isfile(place / "tokenizer.json"):
                return (place if place == parent else require_own(place)) / "tokenizer.json"
    return None


def of_config(config: PreTrainedConfig) -> dict[str, Any]:
    """What `write_tokenizer` must know of the model that a tokenizer is for."""
    ids = {name: next(iter(tokens_of(config, name)), None) for name in TOKEN_IDS}
    return {"vocab_size": config.vocab_size, "max_length": config.max_position_embeddings, **ids}


def write_tokenizer(
    source: Path,
    out: Path,
    *,
    vocab_size: int,
    eos_token_id: int | None,
    pad_token_id: int | None,
    bos_token_id: int | None,
    max_length: int | None,
) -> dict[str, Any]:
    """Write the tokenizer at `source`, a tokenizer.json or its folder, into the folder `out` and prove the copy.

    Of the files beside tokenizer.json only the chat template is carried over, as text. `vocab_size` counts embedding
    rows; an id that is None leaves its token unset. No code in `source` or `out` runs.
    Returns for the report: `size` (highest id + 1), `special_tokens` by id, the number of `probes` compared.
    """
    path = source / "tokenizer.json" if os.path.isdir(source) else source
    if not os.path.isfile(path):
        raise CheckpointError(
            f"the tokenizer must be a tokenizer.json or a folder with one (got {source}); {how_to_make(path.parent)}"
        )
    content, tokenizer, size = read_tokenizer(path, vocab_size)
    tokens = {token_id: token for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
    special = _special(tokenizer)
    expected = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id, "bos_token_id": bos_token_id}
    config: dict[str, Any] = {"tokenizer_class": TOKENIZER_CLASS, "clean_up_tokenization_spaces": False}
    for field, token_id in expected.items():
        if token_id is None:
            continue
        if token_id not in tokens:
            raise CheckpointError(f"`{field}` must be one of the {size} ids of {path} (got {token_id}); {WAY_OUT}")
        if token_id not in special:
            raise CheckpointError(
                f"`{field}` must be a special token (got {token_id}, {tokens[token_id]!r} in {path}): "
                f"the checkpoint and the tokenizer do not belong together; {WAY_OUT}"
            )
        config[field.removesuffix("_id")] = special[token_id]
    if max_length is not None:
        config["model_max_length"] = max_length
    template = _read_chat_template(path.parent)
    if template is not None:
        config["chat_template"] = template

    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_bytes(content)
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    probes = _prove(path, tokenizer, out, {**expected, "chat_template": template})
    return {"size": size, "special_tokens": special, "probes": probes}


# What tokenizers without a tokenizer.json are made of.
SLOW = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")


def how_to_make(folder: Path) -> str:
    """What to do about a folder without a tokenizer.json, which may hold what one is made of.

    It is not made here: Transformers adds tokens, or splits otherwise, by a class that only the user knows is right.
    """
    if found := [name for name in SLOW if os.path.lexists(folder / name)]:
        return (
            f"of {', '.join(found)} Transformers makes one, by the class that tokenizer_config.json names: in Python, "
            f"`AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained('NEW')` writes it to a folder NEW; name "
            "that one by --tokenizer, or give it to `olmem tokenizer`"
        )
    return WAY_OUT


def carry_tokenizer(source: Path, out: Path, vocab_size: int, say: Say) -> dict[str, Any] | None:
    """Copy the tokenizer of the Transformers folder `source`, its files as they are, into `out` and prove the copy.

    Only tokenizer_config.json may change: its class, where a model's own would change the ids (see above), and code
    that it names, which is never run. Returns what `write_tokenizer` does, or None where the folder has no tokenizer.
    """
    path, config_path = source / "tokenizer.json", source / "tokenizer_config.json"
    if not os.path.isfile(path):
        if any(os.path.lexists(source / name) for name in SLOW):
            raise CheckpointError(
                f"the tokenizer of {source} must have a tokenizer.json (it has none); {how_to_make(source)}"
            )
        return None
    content, tokenizer, size = read_tokenizer(path, vocab_size)
    (out / path.name).write_bytes(content)
    given, config = read_tokenizer_config(config_path)
    wanted = config | {"tokenizer_class": TOKENIZER_CLASS}
    if config.get("tokenizer_class") in CLASSES:
        wanted = dict(config)
    if wanted.pop("auto_map", None):
        say("note: tokenizer_config.json names code (`auto_map`), which is not run; only tokenizer.json is taken")
    if files := names_files(wanted):
        say(f"note: tokenizer_config.json names files ({', '.join(files)}), which are not copied")
        wanted = {name: value for name, value in wanted.items() if name not in files}
    refuse_code(wanted, config_path)
    if wanted == config:
        (out / config_path.name).write_bytes(given)
    else:
        with refusing(f"{config_path} must be text in UTF-8", "correct it"):  # \ud800 alone is none
            text = (json.dumps(wanted, indent=2, ensure_ascii=False) + "\n").encode()
        (out / config_path.name).write_bytes(text)
    for name in COMPANIONS:
        if os.path.isfile(source / name):
            (out / name).write_bytes(read_companion(source / name))
    if os.path.isdir(source / "additional_chat_templates"):
        say("note: additional_chat_templates is not copied; copy it by hand if the model needs it")
    expected = {
        name: token["content"] if isinstance(token, dict) and "content" in token else token
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (token := config.get(name)) is not None
    }
    template = _given_template(source, config)
    probes = _prove(path, tokenizer, out, expected | ({} if template is None else {"chat_template": template}))
    return {"size": size, "special_tokens": _special(tokenizer), "probes": probes}


def _given_template(source: Path, config: dict[str, Any]) -> Any:
    """The chat template as transformers has it once loaded: a text, or several by name."""
    if os.path.isfile(source / "chat_template.jinja"):
        return _read_chat_template(source)
    template = config.get("chat_template")
    if isinstance(template, list):
        with refusing(f"`chat_template` of {source} must be a text or a list of named ones", WAY_OUT):
            return {entry["name"]: entry["template"] for entry in template}
    return template


def _special(tokenizer: Tokenizer) -> dict[int, str]:
    """Returns the special tokens by their ids."""
    return {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def _prove(path: Path, tokenizer: Tokenizer, out: Path, expected: dict[str, Any]) -> int:
    """Compare what is in `out` with the tokenizer at `path` on every probe; returns how many there were."""
    texts = texts_for(tokenizer)
    with refusing(f"{path} must load and run in transformers", WAY_OUT), quiet_panics():
        _compare(tokenizer, out, texts, expected)
    return len(texts)


def _read_chat_template(folder: Path) -> str | None:
    """The chat template of a tokenizer's folder; as in transformers, chat_template.jinja goes before the config's."""
    jinja, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    with refusing(f"the chat template in {folder} must be readable", "repair or remove the file"):
        if os.path.lexists(jinja):
            return read_text(jinja)
        template = read_json(config).get("chat_template") if os.path.lexists(config) else None
    if not isinstance(template, str | None):
        raise CheckpointError(
            f"`chat_template` must be one string (got a {type(template).__name__} in {config}); "
            "put the one to keep in chat_template.jinja beside it"
        )
    return template


def _compare(source: Tokenizer, out: Path, texts: list[str], expected: dict[str, Any]) -> None:
    """Load `out` as its users will and refuse any text, vocabulary entry or setting that differs from the source."""
    source.no_truncation()
    source.no_padding()
    # False, not None: a folder whose config.json names remote code would otherwise ask whether to run it.
    written = AutoTokenizer.from_pretrained(str(out), local_files_only=True, trust_remote_code=False)

    def check(what: str, got: Any, wanted: Any) -> None:
        if got != wanted:
            raise CheckpointError(
                f"{what} must stay the same when {out} is loaded (got {got!r}, the source has {wanted!r}); "
                f"convert into an empty folder, or {WAY_OUT}"
            )

    for text in texts:
        for special in (False, True):
            ids = source.encode(text, add_special_tokens=special).ids
            check(f"the ids of {text!r}", written.encode(text, add_special_tokens=special, verbose=False), ids)
            for skip in (False, True):
                wanted = source.decode(ids, skip_special_tokens=skip)
                check(f"the text of {ids}", written.decode(ids, skip_special_tokens=skip), wanted)
    for field, value in expected.items():
        check(f"`{field}`", getattr(written, field), value)
    check("the number of tokens", len(written), source.get_vocab_size())
