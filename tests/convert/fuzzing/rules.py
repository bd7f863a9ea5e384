"""Tokenizers whose rules are of another kind, or never end, or make a text of one letter longer than any memory."""

import json
from random import Random
from typing import Any

from convert.fuzzing.texts import RAW_JSON, encoded, mutate_tree, unmarked

PATTERNS = (
    *(r"(a+)+$Z", r"(a|a)*b", r"((a*)*)*b", r"(\w+\s*)+!", "(", r"\p{Foo}", "a{100000}", "(?:a{1000}){1000}"),
    *("(?:(?:a?){30}){30}X", r"(?<=a+)b", "(?:" * 2000 + "a" + ")" * 2000, "(" * 100_000, "", "^", "$", r"\b", r"(?!)"),
)
TEXTS = ("", "a", "aa", "▁", "x" * 5000, "é", "\0", "\ud7ff")


def pattern(rng: Random) -> dict[str, str]:
    return rng.choice(({"Regex": rng.choice(PATTERNS)}, {"String": rng.choice(TEXTS)}))


def normalizer(rng: Random) -> dict[str, Any]:
    kind = rng.randrange(6)
    if kind == 0:
        return {"type": rng.choice(("NFC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel", "Nope", "Bert"))}
    if kind == 1:
        return {"type": "Precompiled", "precompiled_charsmap": rng.choice(("", "AAAA", "////f///////", "x", None))}
    if kind == 2:
        return {"type": "Prepend", "prepend": rng.choice(TEXTS)}
    replacing = {"type": "Replace", "pattern": pattern(rng), "content": rng.choice(TEXTS)}
    if kind == 3:
        doubling = {"type": "Replace", "pattern": {"String": rng.choice(("a", ""))}, "content": "aa"}
        return {"type": "Sequence", "normalizers": [doubling] * rng.choice((2, 12, 60, 5000))}
    return replacing


def pre_tokenizer(rng: Random) -> dict[str, Any]:
    return rng.choice(
        (
            {"type": "Split", "pattern": pattern(rng), "behavior": rng.choice(("Isolated", "Removed")), "invert": True},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            {
                "type": "Metaspace",
                "replacement": rng.choice(("▁", "", "ab")),
                "prepend_scheme": "always",
                "split": True,
            },
            {"type": "Digits", "individual_digits": True},
            {"type": "Whitespace"},
            {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}] * rng.choice((0, 2, 5000))},
            {"type": "FixedLength", "length": rng.choice((0, 1, 2**63))},
        )
    )


def post_processor(rng: Random) -> dict[str, Any]:
    piece = rng.choice(({"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}))
    template = [piece] * rng.choice((0, 1, 2, 2000, 100_000))
    ids = rng.choice(([13], [99], [], [2**32 - 1]))
    known = {"<|end|>": {"id": "<|end|>", "ids": ids, "tokens": ["<|end|>"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": template, "pair": [], "special_tokens": known}


def decoder(rng: Random) -> dict[str, Any]:
    return rng.choice(
        (
            {"type": "Replace", "pattern": pattern(rng), "content": rng.choice(TEXTS)},
            {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**63},
            {"type": "WordPiece", "prefix": "", "cleanup": True},
            {"type": "CTC", "pad_token": "a", "word_delimiter_token": "", "cleanup": True},
            {"type": "ByteFallback"},
            {"type": "BPEDecoder", "suffix": ""},
        )
    )


def model(rng: Random) -> dict[str, Any]:
    words = {word: number for number, word in enumerate(("a", "b", "Ġ", "é"))}
    number = rng.choice((2**32 - 1, 2**32, -1, 15, 16, 0.5))
    return rng.choice(
        (
            {"type": "WordLevel", "vocab": words, "unk_token": rng.choice(("a", "nope"))},
            {
                "type": "WordPiece",
                "vocab": words,
                "unk_token": "a",
                "continuing_subword_prefix": "",
                "max_input_chars_per_word": 9,
            },
            {
                "type": "Unigram",
                "vocab": [["a", 0.0], ["b", rng.choice((-1e308, 1e308, 0))]],
                "unk_id": rng.choice((0, 9)),
            },
            {"type": "Unigram", "vocab": [["", 0.0]] * rng.choice((0, 1, 20)), "unk_id": 0},
            {"type": "BPE", "vocab": words | {"x": number}, "merges": []},
            {"type": "BPE", "vocab": words, "merges": [["a", "nope"]]},
            {"type": "BPE", "vocab": words, "merges": [], "dropout": rng.choice((0.5, 2, -1)), "byte_fallback": True},
        )
    )


def added_tokens(rng: Random) -> list[dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    number = rng.choice((1, 5, 3000, 60_000))
    word = rng.choice(("t{}", "", "a", "a{}a"))
    first = rng.choice((12, 14, 2**32 - 1, 0))
    return [{"id": first + index, "content": word.format(index)} | plain for index in range(number)]


PARTS = {
    "normalizer": normalizer,
    "pre_tokenizer": pre_tokenizer,
    "post_processor": post_processor,
    "decoder": decoder,
    "model": model,
    "added_tokens": added_tokens,
    "padding": lambda rng: {
        "strategy": {"Fixed": rng.choice((0, 5, 10**6, 2**63))},
        "direction": "Right",
        "pad_to_multiple_of": rng.choice((None, 0, 10**6)),
        **{"pad_id": 12, "pad_type_id": 0, "pad_token": "<|pad|>"},
    },
    "truncation": lambda rng: {
        "direction": "Right",
        "max_length": rng.choice((0, 1, 2, 2**63)),
        **{"strategy": "LongestFirst", "stride": rng.choice((0, 1, 5, 2**63))},
    },
}


def mutate_tokenizer(rng: Random, data: bytes) -> bytes:
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        part = rng.choice(sorted(PARTS))
        tree[part] = PARTS[part](rng)
    if rng.random() < 0.1:
        tree = mutate_tree(rng, tree, RAW_JSON)
    return encoded(rng, unmarked(json.dumps(tree), RAW_JSON, '"'))
