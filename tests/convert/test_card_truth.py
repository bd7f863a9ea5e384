"""Every sentence of a card is true of the folder's files, and goes when the fact goes; its author's words stay."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from convert.checkpoints import edit_json, load_weights, read_config, snapshot, source
from huggingface_hub import ModelCard
from olmem import OlmemConfig, OlmemForCausalLM
from olmem_convert import CardOptions, CheckpointError, ConvertOptions, card, convert, evaluate, verify
from olmem_convert.publish import reloading
from olmem_convert.publish.release import check_release

BASE = "allenai/OLMo-2-0425-1B"
ALWAYS = lambda files, found: True  # noqa: E731  of what is true of every model of Olmem


def layers(files: Any, found: re.Match) -> bool:
    config, kinds = files.config, files.config["layer_types"]
    words = {
        "full_attention": "with full attention",
        "sliding_attention": f"with a sliding window of {config['sliding_window']} tokens",
    }
    told = {f"{kinds.count(kind)} {words[kind]}" for kind in set(kinds)}
    return int(found[1]) == len(kinds) and set(found[2].split(", ")) == told


def origin(files: Any, found: re.Match) -> bool:
    told = files.told
    return (
        (found[1] == files.report.get("source"))
        and (bool(found[2]) == (told.get("origin") == "scratch"))
        and (found[4] == found[5] == told.get("base_model"))
        and (found[3] == {None: "made" if found[4] else None, "scratch": None}.get(told.get("origin"), "fine-tuned"))
        and (found[6] == files.config["dtype"])
    )


def parameters(files: Any, found: re.Match) -> bool:
    sizes = {name: value.numel() for name, value in files.weights.items()}
    of_memory = sum(size for name, size in sizes.items() if "memory" in name or "retrieval" in name)
    return found[1] == f"{sum(sizes.values()):,}" and found[2] == (f"{of_memory:,}" if of_memory else None)


def field(*names: str) -> Callable:
    return lambda files, found: (
        [files.config[name] for name in names] == [json.loads(value) for value in found.groups()]
    )


def chosen(files: Any, found: re.Match) -> bool:
    default = OlmemConfig().to_dict()[found[1]]
    return files.config[found[1]] == json.loads(found[2]) != default


def of_kind(kind: str, check: Callable = ALWAYS) -> Callable:
    return lambda files, found: files.report["kind"] == kind and files.report["passed"] and bool(check(files, found))


def sealed(files: Any, found: re.Match) -> bool:
    unsealed = ("README.md", "verification.json")
    return files.report["sha256"] == {name: sha for name, sha in files.shas.items() if name not in unsealed}


def figure(name: str) -> Callable:
    return of_kind("native", lambda files, found: found[1] == f"{files.report[name]:.3g}")


def is_bounded(files: Any, found: Any = None) -> bool:
    return "full_attention" not in files.config["layer_types"]


CLAIMS: dict[str, Callable] = {
    r"A causal language model of the Olmem family(?:, converted from `(.+?)`)?(, trained from scratch)?"
    r"(?:, (fine-tuned|made) from \[(.+?)\]\(https://huggingface.co/(.+?)\))?, with weights in (\w+)\.": origin,
    r"\| parameters \| ([\d,]+)(?:, of which ([\d,]+) are of the memory)? \|": parameters,
    r"\| layers \| (\d+): (.+) \|": layers,
    r"\| width, MLP \| (\d+), (\d+) \|": field("hidden_size", "intermediate_size"),
    r"\| heads \| (\d+), of (\d+) dimensions each; keys and values (\d+) \|": field(
        "num_attention_heads", "head_dim", "num_key_value_heads"
    ),
    r"\| `shared_projections` \| `key_value`: a value is its key, and one tensor is cached for both \|": (
        lambda files, found: files.config["shared_projections"] == "key_value"
    ),
    r"\| vocabulary \| (\d+) \|": field("vocab_size"),
    r"\| trained length \| (\d+) tokens \|": of_kind("native", field("max_position_embeddings")),
    r"\| `max_position_embeddings` \| (\d+) tokens \|": of_kind("reload", field("max_position_embeddings")),
    r"\| `(\w+)` \| `(.+)` \|": chosen,
    r"The repository contains the model's code\.": (
        lambda files, found: all(f"{name.split('.')[0]}.py" in files.shas for name in files.config["auto_map"].values())
    ),
    r"If `olmem` is installed, you can write `import olmem` instead of `trust_remote_code=True`\.": ALWAYS,
    r"The state of every layer is bounded, so the model reads and writes endless text with constant memory and "
    r"constant time per token\.": is_bounded,
    r"The logits were compared with those of the native model, both computed in float32 from these weights, on a "
    r"prompt of (\d+) random tokens, longer than the `sliding_window` of (\d+):": of_kind(
        "native",
        lambda files, found: (
            [files.report["prompt"]["tokens"], files.config["sliding_window"]] == list(map(int, found.groups()))
        ),
    ),
    r"\| largest difference \| (.+) \|": figure("max_difference"),
    r"\| mean difference \| (.+) \|": figure("mean_difference"),
    r"\| allowed \| (.+) \|": figure("tolerance"),
    r"Every weight was compared bit for bit, and so was every field of the config\.": of_kind(
        "native",
        lambda files, found: [files.report["weight_differences"], files.report["config_differences"]] == [[], {}],
    ),
    r"`verification\.json` has the figures of each block and the sha256 of each file\.": of_kind(
        "native",
        lambda files, found: (
            sealed(files, found) and len(files.report["stages"]) == files.config["num_hidden_layers"] + 3
        ),
    ),
    r"If you have the native checkpoint, you can repeat the comparison with `olmem verify`\.": of_kind("native"),
    r"The code of this repository and olmem (\S+) compute the same logits, bit for bit, on a prompt of (\d+) random "
    r"tokens in (\w+), in a process without token and network\.": of_kind(
        "reload",
        lambda files, found: (
            found.groups()
            == (files.report["versions"]["olmem"], str(files.report["prompt"]["tokens"]), files.report["dtype"])
        ),
    ),
    r"Every weight that the config asks for is there once, in the right shape\.": of_kind(
        "reload",
        lambda files, found: (
            {name: value.shape for name, value in files.weights.items()}
            == {name: value.shape for name, value in OlmemForCausalLM(files.parsed).state_dict().items()}
        ),
    ),
    r"All weights are finite numbers\.": of_kind(
        "reload", lambda files, found: all(value.isfinite().all() for value in files.weights.values())
    ),
    r"The model was not compared with another checkpoint\.": of_kind("reload"),
    r"`verification\.json` has the sha256 of each file\.": of_kind("reload", sealed),
    r"It is not signed, so it is the word of whoever made this repository\.": ALWAYS,
    r"You can repeat the verification of these files with `olmem verify`\.": of_kind("reload"),
    r"These fields of the config describe it:": lambda files, found: files.parsed.has_memory,
    r"- `(\w+)`: `(.+)`": chosen,
    r"Layers with full attention were trained on texts of at most (\d+) tokens, and keep every token that they "
    r"read\.": of_kind(
        "native", lambda files, found: field("max_position_embeddings")(files, found) and not is_bounded(files)
    ),
    r"Layers with full attention keep every token that they read\.": of_kind(
        "reload", lambda files, found: not is_bounded(files)
    ),
    r"llama\.cpp and other programs that only know OLMo cannot load this model\.": ALWAYS,
    r"None of Transformers' own classes can express it\.": (
        lambda files, found: files.parsed.has_memory or files.config["shared_projections"] != "none"
    ),
    r"`olmem convert OUT NEW --to (\w+)` converts it to a class that they know\.": (
        lambda files, found: convert(files.folder, files.scratch, ConvertOptions(to=found[1], verify=False))
    ),
}


def played(tasks: list[dict[str, Any]], scratch: str, token: str | None) -> list[dict[str, Any]]:
    """In place of the process that loads models, which takes seconds."""
    modules = ["olmem." if task["installed"] else "transformers_modules." for task in tasks]
    return [{"logits": "x", "finite": True, "module": module} for module in modules]


@pytest.fixture(scope="module")
def unloaded():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reloading, "run_tasks", played)
        yield


@pytest.fixture(scope="module")
def finished(unloaded, trained, tmp_path_factory) -> Path:
    """A trained model, verified and with its card."""
    folder = tmp_path_factory.mktemp("finished") / "my-model"
    shutil.copytree(trained, folder)
    verify(folder)
    card(folder, CardOptions(license="mit", origin="scratch"))
    return folder


def fine_tuned(converted: Path, folder: Path) -> Path:
    model = OlmemForCausalLM.from_pretrained(converted)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    model.save_pretrained(folder)
    verify(folder)
    card(folder, CardOptions(license="mit", origin="fine-tuned", base_model=BASE, name="you/tuned"))
    return folder


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def sentences(text: str) -> list[str]:
    """Of a card's body without its code, comments and headings: lines of tables and lists, and sentences."""
    body = re.sub(r"```.*?```|<!--.*?-->", "\n", ModelCard(text).text, flags=re.S)
    found = []
    for block in re.split(r"\n\s*\n", body):
        lines = [line for line in block.splitlines() if line.strip() and not re.match(r"#|\|-|\| \||\| \| of", line)]
        rows = [line for line in lines if line.startswith(("|", "- "))]
        rest = " ".join(line for line in lines if line not in rows)
        found += rows + [sentence for sentence in re.split(r"(?<=[.:]) (?=[A-Zl`*])", rest) if sentence]
    return found


@pytest.mark.parametrize("kind", ["converted", "trained", "fine-tuned"])
def test_every_sentence_is_true_of_the_files(kind, converted, finished, tmp_path):
    if kind == "converted":
        folder = Path(shutil.copytree(converted("olmo_core_swa"), tmp_path / "out"))
        card(folder, CardOptions(license="apache-2.0", base_model=BASE))
    elif kind == "trained":
        folder = finished
    else:
        folder = fine_tuned(converted("olmo_core_swa"), tmp_path / "out")
    check_release(folder)
    config, text = read_config(folder), text_of(folder)
    files = SimpleNamespace(
        folder=folder,
        scratch=tmp_path / "scratch",
        config=config,
        parsed=OlmemConfig.from_pretrained(folder),
        report=json.loads((folder / "verification.json").read_text()),
        weights=load_weights(folder),
        shas=snapshot(folder),
        told=ModelCard(text).data.to_dict(),
    )
    found = sentences(text)
    assert len(found) > 15
    for sentence in found:
        matches = [(check, match) for claim, check in CLAIMS.items() if (match := re.fullmatch(claim, sentence))]
        assert matches, f"nobody knows whether this is true: {sentence}"
        check, match = matches[0]
        assert check(files, match), sentence
    names = {"converted": "olmo_core_swa", "trained": "my-model", "fine-tuned": "tuned"}
    assert f"\n# {names[kind]}\n" in text
    assert ("AutoTokenizer" in text) == (folder / "tokenizer.json").is_file()
    for words in ("by `olmem convert`", "was added", "converted from", "native") if kind != "converted" else ():
        assert words not in text
    assert files.told.get("base_model_relation") == ("finetune" if kind == "fine-tuned" else None)


SLIDING, FULL = "sliding_attention", "full_attention"
ROPE = {kind: {"rope_theta": 500000.0, "rope_type": "default"} for kind in (SLIDING, FULL)}
# A fact that is changed, what a card says before, and what it says after.
CHANGES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "shared tensors": (
        lambda out: edit_json(out / "config.json", shared_projections="none"),
        "one tensor is cached for both",
        "llama.cpp",
    ),
    "memory": (
        lambda out: edit_json(out / "config.json", num_memory_tokens=0, memory_segment_length=None),
        "## Memory",
        "llama.cpp",
    ),
    "bounded": (
        lambda out: edit_json(out / "config.json", layer_types=[FULL, SLIDING], rope_parameters=ROPE),
        "The state of every layer is bounded",
        "keep every token that they read",
    ),
    "sinks": (
        lambda out: edit_json(out / "config.json", num_sink_tokens=4),
        "# my-model",
        "see the first 4 tokens",
    ),
    "norms": (
        lambda out: edit_json(out / "config.json", norm_placement="pre"),
        "# my-model",
        '`norm_placement` | `"pre"`',
    ),
    "code": (
        lambda out: (out / "modeling_olmem.py").unlink(),
        "The repository contains the model's code",
        "Install `olmem`",
    ),
    "tokenizer": (lambda out: (out / "tokenizer.json").unlink(), "AutoTokenizer", "AutoModelForCausalLM"),
    "verification": (
        lambda out: edit_json(out / "verification.json", passed=False),
        "bit for bit",
        "Not verified. `olmem verify OUT` checks",
    ),
    "finite": (
        lambda out: edit_json(out / "verification.json", nonfinite={"lm_head.weight": 3}),
        "All weights are finite",
        "3 numbers of the weights are NaN or infinite",
    ),
    "base": (
        lambda out: card(out, CardOptions(base_model=BASE)),
        "trained from scratch",
        f"made from [{BASE}]",
    ),
    "origin": (
        lambda out: card(out, CardOptions(base_model=BASE, origin="fine-tuned")),
        "trained from scratch",
        f"fine-tuned from [{BASE}]",
    ),
    "name": (lambda out: card(out, CardOptions(name="you/it")), 'repo = "…"', 'repo = "you/it"'),
}


@pytest.mark.parametrize("fact", CHANGES)
def test_a_sentence_goes_with_its_fact(fact, finished, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "my-model"))
    change, before, after = CHANGES[fact]
    text = text_of(out)
    assert before in text and (after not in text or after in ("llama.cpp", "AutoModelForCausalLM"))
    change(out)
    if fact not in ("verification", "finite"):
        (out / "verification.json").unlink()
    card(out)
    assert after in text_of(out) and (before not in text_of(out) or before == "# my-model")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"origin": "grown"}, "`origin` must be scratch or fine-tuned"),
        ({"origin": "fine-tuned"}, "add --base-model"),
        ({"origin": "scratch", "base_model": BASE}, "`base_model` must not be named"),
        ({"name": "a b"}, "`model_name` must be a name"),
        ({"name": "<b>"}, "`model_name`"),
    ],
    ids=str,
)
def test_origins_and_names_that_are_none(options, words, trained):
    with pytest.raises(CheckpointError, match=words):
        card(trained, CardOptions(**options))
    assert not (trained / "README.md").exists()


WORDS = "## How it came about\n\nTrained at home. {{ 7 * 7 }} {% raw %}\n\n---\nlicense: none\n---\n<!-- a comment -->"


def write_words(out: Path, words: str = WORDS) -> None:
    text = text_of(out)
    assert "<!-- your own words -->\n" in text
    begin, end = text.index("<!-- your own words -->\n"), text.index("<!-- end -->")
    (out / "README.md").write_text(f"{text[:begin]}<!-- your own words -->\n{words}\n{text[end:]}")


def test_its_author_s_words_stay(changeable, tmp_path):
    out = changeable("olmo_core_swa")
    card(out, CardOptions(license="mit"))
    write_words(out)
    check_release(out)
    text = text_of(out)
    for rewrite in (
        lambda: card(out, CardOptions(language=["en"])),
        lambda: verify(out, source("olmo_core_swa")),
        lambda: convert(source("olmo_core_swa"), out, ConvertOptions(overwrite=True)),
        lambda: card(out),
    ):
        rewrite()
        assert f"<!-- your own words -->\n{WORDS}\n<!-- end -->" in text_of(out)
    assert text_of(out).replace("language:\n- en\n", "") == text
    check_release(out)


def test_evaluating_keeps_its_author_s_words(changeable, tmp_path):
    out = changeable("demo")
    write_words(out)
    (tmp_path / "a.txt").write_text("Once upon a time there was a text.")
    evaluate(out, [tmp_path / "a.txt"])
    assert WORDS in text_of(out) and "## Evaluation" in text_of(out)


EDITS = {
    "a figure": lambda text: text.replace("| vocabulary | ", "| vocabulary | 9"),
    "a paragraph": lambda text: text + "\nMine.\n",
    "the comments": lambda text: text.replace("<!-- end -->\n", ""),
    "another tag": lambda text: text.replace("- olmem\n", "- olmem\n- mine\n"),
    "another field": lambda text: text.replace("license: mit\n", "license: mit\nthumbnail: a.png\n"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_elsewhere_are_refused_before_they_are_lost(edit, changeable):
    out = changeable("olmo_core_swa")
    card(out, CardOptions(license="mit"))
    (out / "README.md").write_text(EDITS[edit](text_of(out)))
    before = snapshot(out)
    for run in (
        lambda: card(out),
        lambda: verify(out, source("olmo_core_swa")),
        lambda: convert(source("olmo_core_swa"), out, ConvertOptions(overwrite=True)),
        lambda: check_release(out),
    ):
        with pytest.raises(CheckpointError, match=r"was edited elsewhere.*remove the comment at its top"):
            run()
    assert snapshot(out) == before
    mine = re.sub(r"<!-- Written by olmem.*?-->\n", "", text_of(out))
    (out / "README.md").write_text(mine)
    check_release(out)
    verify(out, source("olmo_core_swa"))
    assert text_of(out) == mine


def test_what_a_comparison_told_is_not_replaced_by_less(changeable):
    out = changeable("olmo_core_swa")
    before = snapshot(out)
    with pytest.raises(CheckpointError, match="`--against` must be given"):
        verify(out)
    assert snapshot(out) == before


def test_a_trained_folder_with_what_is_not_published_is_not_verified(trained, unloaded, tmp_path):
    out = Path(shutil.copytree(trained, tmp_path / "out"))
    torch.save({}, out / "training_args.bin")
    with pytest.raises(CheckpointError, match=r"training_args.*a pickle by its name.*move it away"):
        verify(out)
    (out / "training_args.bin").unlink()
    path = out / "modeling_olmem.py"
    path.write_text(path.read_text() + "\nimport os\n")
    with pytest.raises(CheckpointError, match=r"modeling_olmem\.py.*save it by `save_pretrained`"):
        verify(out)


def test_other_logits_of_its_own_code_are_refused(trained, monkeypatch, tmp_path):
    out = Path(shutil.copytree(trained, tmp_path / "out"))
    loaded = [{"logits": name, "finite": True, "module": name} for name in ("transformers_modules.", "olmem.")]
    monkeypatch.setattr(reloading, "run_tasks", lambda *_: loaded)
    with pytest.raises(CheckpointError, match="must be those of the installed olmem"):
        verify(out)
    assert not (out / "verification.json").exists()


def test_a_folder_of_transformers_own_class_is_verified_later_and_uploaded_by_hand(converted, tmp_path):
    olmem, out = converted("olmo"), tmp_path / "out"
    convert(olmem, out, ConvertOptions(to="olmo2", verify=False))
    with pytest.raises(CheckpointError, match="`--against` must name the Olmem folder"):
        verify(out)
    report = verify(out, olmem)
    assert report["passed"] and report["kind"] == "exported"
    assert json.loads((out / "verification.json").read_text())["kind"] == "exported"
    for run in (lambda: check_release(out), lambda: card(out)):
        with pytest.raises(CheckpointError, match=f"README.md by hand, .* `hf upload REPO_ID {re.escape(str(out))}`"):
            run()
    edit_json(out / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(CheckpointError, match=r"`rms_norm_eps` .* must be 1e-06.*got 0\.001"):
        verify(out, olmem)
