"""JSON and YAML with other values in them: wrong types, numbers that are none, depth, length, sharing, tags, names."""

import copy
import json
import re
from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import Any

import yaml
from convert.fuzzing.pickles import CANARY

# Written into the text as they stand, in place of a string that only marks the spot.
MARK = "\u0001{}\u0001"
RAW_JSON = (
    "1" * 100_000,
    "-" + "9" * 4200,
    "1e999",
    "-1e999",
    "1e-999",
    "NaN",
    "Infinity",
    "-Infinity",
    "[" * 900 + "]" * 900,
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 900 + "1" + "}" * 900,
    '{"a":' * 90 + "1" + "}" * 90,
    '{"a":' * 100_000 + "1" + "}" * 100_000,
    '"\\ud800"',
    '"\\u0000"',
    "01",
    "0x10",
    "1_000",
    "",
    "'x'",
    '"a", "b": 1',
    "/* x */ 1",
    "[" + "0," * 50_000 + "0]",
    "{" + ",".join(f'"k{number}":{number}' for number in range(20_000)) + "}",
)
RAW_YAML = (
    *RAW_JSON[:12],
    f"!!python/object/apply:os.mkdir [{CANARY}]",
    f"!!python/object/new:os.mkdir [{CANARY}]",
    f"!!python/name:os.mkdir {CANARY}",
    "!!python/module:antigravity",
    "!!python/tuple [1]",
    f"!!python/object/apply:subprocess.Popen [[mkdir, {CANARY}]]",
    "!!binary x",
    "!!binary AAAA",
    "!!int ''",
    "!!int x",
    "!!float x",
    "!!bool x",
    "!!timestamp x",
    "2001-99-99",
    "2001-01-01",
    "1_0:0",
    "1:99:99",
    "0b12",
    "0o17",
    "09",
    ".nan",
    ".inf",
    "-.inf",
    "1e-6",
    "~",
    "yes",
    "&a [*a]",
    "&a {x: *a}",
    "*nowhere",
    "&a [&b [x, x], *b, *b]",
    "[&a0 [x, x], " + ", ".join(f"&a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)) + "]",
    "{<<: {x: 1}}",
    "{<<: [1]}",
    "{? [1] : 2}",
    "{? {x: 1} : 2}",
    "!!set {x, y}",
    "!!omap [x: 1]",
    "!x 1",
    "|\n x\n",
    "\t",
    "%TAG",
    "--- 1",
    "...",
    "@x",
    "`x",
    "{",
    "[",
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 8, 16, 255, 0.5, -0.5, -0.0, 1e-320, 1e-9, 1e30, 1e308),
    *(2**31, 2**31 - 1, 2**53, 2**60, 2**63, 2**64, 10**30, 10**400, -(2**63), 100_000, 1000, 65536),
    *("", "x", "0", "1", "1e-6", "nan", "inf", "true", "../x", "..", "/etc/passwd", "/etc/", "a\0b", "x" * 5000),
    *(
        "é\u202e\ud800",
        "{{ x }}",
        "{% for",
        "cuda",
        "float32",
        "float8_e4m3fn",
        "olmo",
        "olmo3",
        "olmem",
        "LlamaTokenizer",
    ),
    *([], {}, [[]], [None], [1], ["x"], [0.5, "x"], [-1], {"": None}, {"x": {"y": 1}}, [[[[[]]]]]),
    *("full_attention", "sliding_attention", "chunked_attention", ["full_attention"], ["sliding_attention"]),
    *({"rope_type": "yarn"}, {"rope_type": "dynamic", "factor": 2.0}, {"type": "linear", "factor": -1.0}),
    *({"rope_type": "llama3", "factor": 0}, {"rope_type": "yarn", "factor": -4.0, "rope_theta": 0}),
)
# Fields that configs and tokenizers of other models have, or that ask for something.
NAMES = (
    *(
        "auto_map",
        "quantization_config",
        "torch_dtype",
        "dtype",
        "num_labels",
        "id2label",
        "architectures",
        "model_type",
    ),
    *("_name_or_path", "rope_scaling", "rope_theta", "rope_parameters", "layer_types", "sliding_window", "head_dim"),
    *("hidden_act", "clip_qkv", "return_dict", "is_causal", "pruned_heads", "problem_type", "transformers_version"),
    *(
        "tie_word_embeddings",
        "__class__",
        "__init__",
        "self",
        "chat_template",
        "tokenizer_class",
        "extra_special_tokens",
    ),
    *("additional_special_tokens", "added_tokens_decoder", "processor_class", "tokenizer_file", "vocab_file", "cls"),
    *("model_max_length", "attn_implementation", "_attn_implementation", "_commit_hash", "experts_implementation"),
    *("olmo_config", "n_layers", "block_overrides", "block", "vocab_size", "num_hidden_layers", "attention_bias"),
    *("generation_config", "trust_remote_code", "_CLASS_", "weight_map", "metadata", "tensors", "shape", "use_cache"),
    *("num_memory_tokens", "retrieval_layers", "shared_projections", "position_embedding", "num_sink_tokens"),
    "sink_logit_init",
)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value below the top."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in list(keys):
            yield node, key
            waiting.append(node[key])


def mutate_tree(rng: Random, tree: Any, raw: tuple[str, ...]) -> Any:
    """The tree with a few values changed; what stands for raw text has a mark around its number."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(islice(places(tree), 20_000))
        if not found:
            return junk(rng, raw)
        node, key = rng.choice(found)
        kind = rng.randrange(12)
        if kind <= 4:
            node[key] = junk(rng, raw)
        elif kind == 5:
            node[key] = near(rng, node[key])
        elif kind == 6:
            node[key] = copy.deepcopy(rng.choice(found)[0])
        elif kind == 7:
            other, name = rng.choice(found)
            node[key] = copy.deepcopy(other[name])
        elif kind == 8:
            del node[key]
        elif isinstance(node, list):
            node[key:key] = [node[key]] * (1 if isinstance(node[key], dict | list) else rng.choice((1, 2, 1000)))
        elif kind == 9:
            node[rng.choice((*NAMES, *map(str, VALUES[31:44])))] = node.pop(key)
        elif kind == 10:
            node[rng.choice(NAMES)] = junk(rng, raw)
        else:
            node[MARK.format(f"again {key}")] = junk(rng, raw)
    return tree


def junk(rng: Random, raw: tuple[str, ...]) -> Any:
    if rng.random() < 0.3:
        return MARK.format(rng.randrange(len(raw)))
    return copy.deepcopy(rng.choice(VALUES))


def near(rng: Random, value: Any) -> Any:
    """Another value of the same type, mostly."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, value * 2, value // 2, float(value), str(value)))
    if isinstance(value, float):
        return rng.choice((value * 2, -value, int(value) if abs(value) < 1e18 else 0, value * 1e-9, str(value)))
    if isinstance(value, str):
        return rng.choice((value + "x", value[:-1], value.upper(), value + "/..", "../" + value, f"./{value}", [value]))
    if isinstance(value, list):
        return rng.choice((value[:-1], value * 2, value[::-1], dict(enumerate(map(str, value))), value[:1] * 3))
    if isinstance(value, dict):
        return rng.choice((list(value), list(value.values()), value | {"x": 1}, {"x": value}, {}))
    return 1


def unmarked(text: str, raw: tuple[str, ...], quotes: str) -> str:
    text = re.sub(rf"{quotes}(?:\x01|\\u0001|\\x01)again (.*?)(?:\x01|\\u0001|\\x01){quotes}", r'"\1"', text)
    return re.sub(
        rf"{quotes}(?:\x01|\\u0001|\\x01)(\d+)(?:\x01|\\u0001|\\x01){quotes}", lambda match: raw[int(match[1])], text
    )


def mutate_json(rng: Random, data: bytes) -> bytes:
    tree = mutate_tree(rng, json.loads(data), RAW_JSON)
    text = unmarked(json.dumps(tree), RAW_JSON, '"')
    return encoded(rng, text)


def mutate_yaml(rng: Random, data: bytes) -> bytes:
    if b"&" in data:
        raise ValueError("aliases of an earlier change may stand for more than any memory holds")
    tree = mutate_tree(rng, yaml.safe_load(data), RAW_YAML)
    text = yaml.dump(
        tree, Dumper=PlainDumper, width=10**6, allow_unicode=False, default_flow_style=rng.choice((False, True))
    )
    return encoded(rng, unmarked(text, RAW_YAML, "[\"']?"))


class PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def encoded(rng: Random, text: str) -> bytes:
    kind = rng.randrange(40)
    data = text.encode("utf-8", "surrogatepass")
    if kind == 0:
        return text.encode(rng.choice(("utf-16", "utf-32", "utf-7")), "replace")
    if kind == 1:
        return b"\xef\xbb\xbf" + data
    if kind == 2:
        return data + rng.choice((b"{}", b"\0", b"x", b"\n---\n" + data))
    return data


def mutate_text(rng: Random, data: bytes) -> bytes:
    """A chat template or a list of merges."""
    pieces = (
        *("{{ messages }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for", "{{", "{#", "x" * 5000, "\0"),
        *(
            "{% include '/etc/passwd' %}",
            f"{{{{ cycler.__init__.__globals__.os.mkdir('{CANARY}') }}}}",
            "a b",
            "\n" * 900,
        ),
        "{% for i in range(10**9) %}{{ i }}{% endfor %}",
        "(" * 100_000,
    )
    text = data.decode("utf-8", "replace")
    at = rng.randrange(len(text) + 1)
    return encoded(rng, text[:at] + rng.choice(pieces) + text[at:])
