"""The tokenizer of a converted folder: the native tokenizer.json byte for byte, under a class that keeps its ids.

Transformers 5 rebuilds the splitting rule when `tokenizer_class` names a model's own class (`GPT2TokenizerFast`,
`GPTNeoXTokenizerFast`), and digits and newlines then get other ids than the model was trained on. The generic class
takes tokenizer.json as it stands. What was written is loaded again and compared with the source.
"""

import base64
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from .errors import CheckpointError
from .reading.plain import require_own
from .reading.texts import LARGEST_TOKENIZER, read_bytes, read_json, read_text, require_numbers, require_shallow

TOKENIZER_CLASS = "PreTrainedTokenizerFast"
LONGEST_TEXT = 1e31  # of `model_max_length`, which Transformers sets to 1e30 where there is no limit
# Of a tokenizer.json: characters of its rules, beside vocabulary and added tokens; times that they lengthen a text; and
# added tokens. Those in use have 2**19, 2**4 and 6,415.
LARGEST_RULES, LARGEST_GROWTH, MOST_ADDED = 2**21, 2**8, 10_000
WAY_OUT = "--tokenizer chooses another tokenizer"

# Ids that templates add to a text, characters that are put before it, signs of a token and of all added ones, regexes.
MOST_TEMPLATE_IDS, LONGEST_PREPEND, LONGEST_TOKEN, LARGEST_ADDED, MOST_REGEXES = 2**10, 2**6, 2**12, 2**20, 16

# Texts on which splitting rules, normalizers and byte fallbacks are known to part.
PROBES = (
    "",
    *("12345678901234567890"[:length] for length in range(1, 21)),
    "5123 65536 10000 1000000 20262026 31415926535897932384626433832795",
    "1,234,567.89 3.14159e-26 0x1F 007",
    "2026-11-22 12:34:56 100% $5.00 v1.2.3rc4 a1b22c333d4444",
    "\u0661\u0662\u0663\u0664\u0665 \uff11\uff12\uff13\uff14 \u00bd\u00b2\u2463\u2167 \u4e09\u5341\u4e94",
    *("\n" * length for length in range(1, 6)),
    *("\t" * length for length in range(1, 5)),
    *(" " * length for length in (1, 2, 3, 4, 7, 8, 16, 33)),
    " leading and trailing ",
    "  two  gaps   here    now",
    " \n  \n\n indented\n\n\n end\n",
    "\n\tx\n\t\ty \t \n\t z",
    "one\r\ntwo\r\n\r\nthree\rfour\n\rfive",
    "no\u00a0break\u2003em\u3000wide\u2028line\u0085next\x0btab\x0cpage",
    "I'm you're he'll we've they'd it's don't I'M YOU'RE HE'LL WE'VE THEY'D IT'S it\u2019s o'clock 'tis '90s ''s",
    'Hello, world! ("quoted") [x] {y} ... --- ___ ?!?! ~`@#$%^&*+=|\\<>/;: #tag @user a/b/c e.g. U.S.A.',
    'def f(x: int) -> str:\n    return f"{x!r:>10}"  # note\n\n\nclass A(B):\n\tpass\n',
    "for (int i=0;i<10;++i){ a[i]+=b->c*2; }\r\n// end\n<p class=\"x\">&amp;</p> SELECT * FROM t WHERE a<>'b';",
    "https://example.org/a_b?q=1&r=%20#x user.name+tag@mail.example C:\\Temp\\new.txt camelCase snake_case UPPER",
    "na\u00efve caf\u00e9 \u00dcbung stra\u00dfe \u0152uvre \u0141\u00f3d\u017a \u0130stanbul \u01c5 \ufb01n",
    "cafe\u0301 n\u0303 a\u0308\u0323 Z\u0351\u036b\u0343 \u0301lone e\u20dd \u212b \u00c5 A\u030a \u1e9b\u0323",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u65e5\u672c\u8a9e\u3072\u3089\u304c\u306a\u30ab\u30bf\u30ab\u30ca\uff76\uff9e",
    "\ud55c\uad6d\uc5b4 \uac00 \u1100\u1161 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u200frtl\u200e \u202bmixed 123\u202c",
    "\u0391\u03b8\u03ae\u03bd\u03b1 \u041f\u0440\u0438\u0432\u0435\u0442 \u10d2\u10d0 \u1e9e \u20ac \u201cq\u201d",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7 1\ufe0f\u20e3",
    "\U00010348\U0001d49c\U00020000\U0002f800 \U000e0041 \U0010fffd \ue000 \ufffd \ufeff",
    "\x00\x01\x7f\u200b\u00ad\u2060 \u2211\u222b\u221a2 \u2264 \u2192 \u2500\u2502\u2588 \u2026 \u2014",
    "a" * 40 + " " + "=" * 33 + " antidisestablishmentarianism MiXeD cAsE ABCdef",
)


def find_tokenizer(checkpoint: Path) -> Path | None:
    """The tokenizer.json in the checkpoint, in its tokenizer/, beside it or in tokenizer/ beside it, in this order."""
    folder = Path(os.path.abspath(checkpoint))
    for parent in (folder, folder.parent):
        for place in (parent, parent / "tokenizer"):
            if os.path.isfile(place / "tokenizer.json"):
                return (place if place == parent else require_own(place)) / "tokenizer.json"
    return None


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
        raise CheckpointError(f"the tokenizer must be a tokenizer.json or a folder with one (got {source}); {WAY_OUT}")
    content, tokenizer, size = _read(path, vocab_size)
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


# Of a Transformers tokenizer, beside tokenizer.json and tokenizer_config.json.
COMPANIONS = (
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
# What tokenizers without a tokenizer.json are made of.
SLOW = ("vocab.json", "merges.txt", "tokenizer.model")


def carry_tokenizer(source: Path, out: Path, vocab_size: int, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Copy the tokenizer of the Transformers folder `source`, its files as they are, into `out` and prove the copy.

    Only tokenizer_config.json may change: its class, where a model's own would change the ids (see above), and code
    that it names, which is never run. Returns what `write_tokenizer` does, or None where the folder has no tokenizer.
    """
    path, config_path = source / "tokenizer.json", source / "tokenizer_config.json"
    if not os.path.isfile(path):
        if slow := [name for name in SLOW if os.path.lexists(source / name)]:
            raise CheckpointError(
                f"the tokenizer of {source} must have a tokenizer.json (got {', '.join(slow)} alone); write one with "
                f"`AutoTokenizer.from_pretrained(…).save_pretrained(…)`, or {WAY_OUT}"
            )
        return None
    content, tokenizer, size = _read(path, vocab_size)
    (out / path.name).write_bytes(content)
    config = read_json(config_path) if os.path.lexists(config_path) else {}
    _check_config(config, config_path)
    wanted = config | {"tokenizer_class": TOKENIZER_CLASS}
    if config.get("tokenizer_class") in ("TokenizersBackend", TOKENIZER_CLASS):
        wanted = dict(config)
    if wanted.pop("auto_map", None):
        say("note: tokenizer_config.json names code (`auto_map`), which is not run: what goes along is tokenizer.json")
    if wanted == config:
        (out / config_path.name).write_bytes(read_bytes(config_path))
    else:
        with _refusing(f"{config_path} must be text in UTF-8", "correct it"):  # \ud800 alone is none
            text = (json.dumps(wanted, indent=2, ensure_ascii=False) + "\n").encode()
        (out / config_path.name).write_bytes(text)
    for name in COMPANIONS:
        if os.path.isfile(source / name):
            if name.endswith(".json"):
                require_numbers(read_json(source / name), str(source / name))
            (out / name).write_bytes(read_bytes(source / name))
    if os.path.isdir(source / "additional_chat_templates"):
        say("note: additional_chat_templates does not go along: copy it by hand if the model needs it")
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
        with _refusing(f"`chat_template` of {source} must be a text or a list of named ones", WAY_OUT):
            return {entry["name"]: entry["template"] for entry in template}
    return template


def _read(path: Path, vocab_size: int) -> tuple[bytes, Tokenizer, int]:
    """A tokenizer.json: its bytes, the tokenizer, and its size (highest id + 1), at most `vocab_size`."""
    with _refusing(f"{path} must be a readable tokenizer.json", WAY_OUT):
        content = read_bytes(path, LARGEST_TOKENIZER)
        tree = json.loads(content)
        require_shallow(tree, path)
        _check_rules(tree, path)
        tokenizer = Tokenizer.from_buffer(content)
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not 0 < size <= vocab_size:
        raise CheckpointError(f"`vocab_size` must cover the {size} tokens of {path} (got {vocab_size}); {WAY_OUT}")
    return content, tokenizer, size


def _check_config(config: dict[str, Any], path: Path) -> None:
    require_numbers(config, str(path))
    template, length = config.get("chat_template"), config.get("model_max_length")
    entries = template if isinstance(template, list) else []
    named = all(
        isinstance(entry, dict) and all(isinstance(entry.get(part), str) for part in ("name", "template"))
        for entry in entries
    )
    if not isinstance(template, str | list | None) or not named:
        raise CheckpointError(
            f"`chat_template` of {path} must be a text or a list of named ones (got {template!r}); correct it."
        )
    number = isinstance(length, int | float) and not isinstance(length, bool)
    if length is not None and not (number and 0 < length <= LONGEST_TEXT):
        raise CheckpointError(f"`model_max_length` of {path} must be a positive number (got {length!r}); correct it.")


def _check_rules(tree: dict[str, Any], path: Path) -> None:
    """Before the tokenizer is made, and a text of it: sizes at which either has no end."""
    rules = {name: part for name, part in tree.items() if name not in ("model", "added_tokens")}
    size, growth = len(json.dumps(rules)), _growth(rules)
    for text in _charsmaps(rules):
        head = base64.b64decode(text[:8], validate=True)[:4]
        if int.from_bytes(head, "little") > len(text):
            raise CheckpointError(f"`precompiled_charsmap` of {path} must be as long as it says; {WAY_OUT}")
    added = tree.get("added_tokens")
    number = len(added) if isinstance(added, list) else 0
    lengths = [len(str(token.get("content"))) for token in added or () if isinstance(token, dict)] if number else [0]
    vocabulary = (tree.get("model") or {}).get("vocab") or ()
    entries = vocabulary if isinstance(vocabulary, dict) else (part[0] for part in vocabulary if part)
    for what, got, most in (
        ("rules of at most {} characters", size, LARGEST_RULES),
        ("rules that lengthen a text at most {} times", growth, LARGEST_GROWTH),
        ("at most {} added tokens", number, MOST_ADDED),
        ("added tokens of at most {} characters", sum(lengths), LARGEST_ADDED),
        ("tokens of at most {} characters", max([*lengths, *(len(str(entry)) for entry in entries)]), LONGEST_TOKEN),
        ("templates that add at most {} ids", _count(rules, _template_ids), MOST_TEMPLATE_IDS),
        ("at most {} characters to put before a text", _count(rules, _prepended), LONGEST_PREPEND),
        ("at most {} regular expressions", _count(rules, lambda node: "Regex" in node), MOST_REGEXES),
    ):
        if got > most:
            raise CheckpointError(f"{path} must have {what.format(f'{most:,}')} (got {got:,}); {WAY_OUT}")


def _charsmaps(node: Any) -> Iterator[str]:
    """The tables of all normalizers, which begin with the size that is then allocated."""
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _charsmaps(part)
    if isinstance(node, dict) and isinstance(text := node.get("precompiled_charsmap"), str):
        yield text


def _count(node: Any, of: Callable[[dict[str, Any]], int]) -> int:
    """The sum over all objects below."""
    own = int(of(node)) if isinstance(node, dict) else 0
    parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return own + sum(_count(part, of) for part in parts)


def _template_ids(node: dict[str, Any]) -> int:
    if node.get("type") != "TemplateProcessing" or not isinstance(tokens := node.get("special_tokens"), dict):
        return 0
    ids = {name: len(token["ids"]) for name, token in tokens.items() if isinstance(token, dict) and "ids" in token}
    pieces = [piece for name in ("single", "pair") for piece in node.get(name) or ()]
    return sum(ids.get((piece.get("SpecialToken") or {}).get("id"), 0) for piece in pieces if isinstance(piece, dict))


def _prepended(node: dict[str, Any]) -> int:
    return len(str(node.get("prepend", ""))) if node.get("type") == "Prepend" else 0


def _growth(node: Any) -> int:
    """How many times longer a text may become by all the replacements below, and by being repeated."""
    if isinstance(node, list):
        repeated = sum(isinstance(part, dict) and "Sequence" in part for part in node)  # in a template
        return min(max(repeated, 1) * math.prod(map(_growth, node)), LARGEST_GROWTH + 1)
    if not isinstance(node, dict):
        return 1
    own = 1 + len(str(node.get("content"))) if node.get("type") == "Replace" else 1
    return min(own * _growth(list(node.values())), LARGEST_GROWTH + 1)


def _special(tokenizer: Tokenizer) -> dict[int, str]:
    return {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def _prove(path: Path, tokenizer: Tokenizer, out: Path, expected: dict[str, Any]) -> int:
    """Compare what is in `out` with the tokenizer at `path` on every probe; returns how many there were."""
    texts = [*PROBES]
    for token in tokenizer.get_added_tokens_decoder().values():
        texts += [token.content, token.content * 2, f"one {token.content} two{token.content}3\n{token.content}\n"]
    with _refusing(f"{path} must load and run in transformers", WAY_OUT):
        _compare(tokenizer, out, texts, expected)
    return len(texts)


@contextmanager
def _refusing(rule: str, way_out: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into a `CheckpointError`; interrupts pass.

    The tokenizers library raises bare `Exception`, and where Rust panics `PanicException`, which is not an `Exception`.
    """
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{rule} (got {type(error).__name__}: {str(error)[:200]}); {way_out}") from error


def _read_chat_template(folder: Path) -> str | None:
    """The chat template of a tokenizer's folder; as in transformers, chat_template.jinja goes before the config's."""
    jinja, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    with _refusing(f"the chat template in {folder} must be readable", "repair or remove the file"):
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
