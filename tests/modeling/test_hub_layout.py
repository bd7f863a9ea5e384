"""A saved folder is a whole Hub repository: its own code loads it where `olmem` is not installed."""

import ast
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import olmem
import pytest
import torch
from fresh import run_fresh
from modeling.helpers import TINY, tiny, tokens
from olmem import OlmemConfig
from safetensors.torch import load_file

PACKAGE = Path(olmem.__file__).parent
CLASSES = {
    "AutoModel": olmem.OlmemModel,
    "AutoModelForCausalLM": olmem.OlmemForCausalLM,
    "AutoModelForSequenceClassification": olmem.OlmemForSequenceClassification,
    "AutoModelForTokenClassification": olmem.OlmemForTokenClassification,
}
CAUSAL = "AutoModelForCausalLM"
AUTO_MAP = {"AutoConfig": "configuration_olmem.OlmemConfig"} | {
    "AutoModel": "modeling_olmem.OlmemModel",
    "AutoModelForCausalLM": "modeling_olmem.OlmemForCausalLM",
    "AutoModelForSequenceClassification": "heads_olmem.OlmemForSequenceClassification",
    "AutoModelForTokenClassification": "heads_olmem.OlmemForTokenClassification",
}
IDS = tokens(1, 11)

# Loads, runs, saves and loads again; argv: places by Auto class, the ids, the folder to write to.
ELSEWHERE = """
import json, sys
sys.modules["olmem"] = sys.modules["olmem_convert"] = None  # as if not installed, where they are
try:
    import olmem
    raise SystemExit("olmem can be imported")
except ImportError:
    pass
import torch, transformers
from safetensors.torch import save_file

places, ids, out = json.loads(sys.argv[1]), torch.tensor(json.loads(sys.argv[2])), sys.argv[3]
found = {}

def load(auto_class, place):
    config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=True)
    model = getattr(transformers, auto_class).from_pretrained(place, trust_remote_code=True)
    for thing in (config, model):
        assert type(thing).__module__.startswith("transformers_modules."), type(thing).__module__
    assert type(model.config) is type(config)
    return model

with torch.no_grad():
    for auto_class, place in places.items():
        model = load(auto_class, place)
        found[auto_class] = model(ids)[0]
        model.save_pretrained(f"{out}/{auto_class}")
        found[f"{auto_class} again"] = load(auto_class, f"{out}/{auto_class}")(ids)[0]
    causal = load("AutoModelForCausalLM", places["AutoModelForCausalLM"])
    found["written"] = causal.generate(ids, max_new_tokens=6, do_sample=False)
    for auto_class in places:
        model = load(auto_class, places["AutoModelForCausalLM"])
        found[f"{auto_class} from causal"] = getattr(model, "model", model)(ids)[0]
save_file(found, f"{out}/found.safetensors")
"""


@pytest.fixture(scope="module")
def models():
    # What the folder has beside the defaults must come from its configuration.
    changes = {"norm_placement": "peri", "clip_qkv": 0.5, "logits_scaling": 2.0, "num_labels": 3}
    return {name: tiny(model_class, **changes).eval() for name, model_class in CLASSES.items()}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in models}


def hub_cache(folder: Path, repo: str, home: Path) -> str:
    """Lays a folder out as the Hub's cache does: blobs by hash, a snapshot of links to them, a ref."""
    root = home / "hub" / f"models--{repo.replace('/', '--')}"
    commit = hashlib.sha1(repo.encode()).hexdigest()
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (root / part).mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for path in folder.iterdir():
        blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        (root / "snapshots" / commit / path.name).symlink_to(Path("../../blobs") / blob.name)
    return repo


def code(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.py")}


def assert_complete(folder: Path) -> None:
    assert code(folder) == {path.name: path.read_bytes() for path in PACKAGE.glob("*_olmem.py")}
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    for reference in config["auto_map"].values():
        module, name = reference.split(".")
        assert f"class {name}(" in (folder / f"{module}.py").read_text()


@pytest.mark.parametrize("name", CLASSES)
def test_a_saved_folder_has_the_code_and_names_every_auto_class(name, folders):
    assert_complete(folders[name])


def test_a_saved_configuration_has_its_code(tmp_path):
    OlmemConfig(**TINY).save_pretrained(tmp_path)
    assert set(code(tmp_path)) == {"adapters_olmem.py", "configuration_olmem.py", "rules_olmem.py"}
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoConfig"] == AUTO_MAP["AutoConfig"]


@pytest.mark.parametrize("layout", ["folder", pytest.param("hub cache", marks=pytest.mark.slow)])
def test_a_process_without_olmem_loads_runs_and_saves_it(layout, models, folders, tmp_path):
    home = tmp_path / "home"
    places = {name: str(folder) for name, folder in folders.items()}
    if layout == "hub cache":
        places = {name: hub_cache(folder, f"an-org/olmem-0.5-{name}", home) for name, folder in folders.items()}
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment = kept | {"HOME": str(home), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    child = run_fresh(ELSEWHERE, json.dumps(places), json.dumps(IDS.tolist()), tmp_path, cwd=tmp_path, env=environment)
    assert child.returncode == 0, child.stderr

    found = load_file(tmp_path / "found.safetensors")
    causal = models[CAUSAL]
    with torch.no_grad():
        expected = {name: model(IDS)[0] for name, model in models.items()}
        expected |= {f"{name} again": output for name, output in expected.items()}
        expected |= {f"{name} from causal": causal.model(IDS)[0] for name in CLASSES}
        expected["written"] = causal.generate(IDS, max_new_tokens=6, do_sample=False)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    for name in CLASSES:
        assert_complete(tmp_path / name)


ALLOWED = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}


def unguarded(node: ast.AST):
    """The imports that Transformers' loader demands: in every scope, except inside `try`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Try):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from unguarded(child)


def faults(path: Path) -> list[str]:
    """What the loader of remote code cannot load in a file: it copies flat siblings that a pattern finds in the text,
    and wants every other import installed."""
    source = path.read_text()
    found = []
    for name in re.findall(r"^\s*from\s+\.(\S+)\s+import", source, re.MULTILINE):
        if not (path.parent / f"{name}.py").is_file():
            found.append(f"from .{name}: no such file")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level and (node.level > 1 or not node.module):
            found.append(f"line {node.lineno}: not `from .name import`")
    for node in unguarded(ast.parse(source)):
        level = node.level if isinstance(node, ast.ImportFrom) else 0
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        wanted = {name.split(".")[0] for name in names} - ALLOWED
        if not level and wanted:
            found.append(f"line {node.lineno}: {', '.join(wanted)} outside `try`")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*_olmem.py")), ids=lambda path: path.name)
def test_the_loader_of_remote_code_can_load_the_file(path):
    assert faults(path) == []


@pytest.mark.parametrize(
    "source",
    [
        "from .missing import x",
        "def f():\n    from .missing import x",
        '"""\nfrom .missing import x\n"""',
        "from . import sibling",
        "from ..sibling import x",
        "from .folder.file import x",
        "import numpy",
        "def f():\n    import triton.language as tl",
        "if True:\n    from olmem.sibling import x",
    ],
)
def test_what_the_loader_cannot_load_is_found(source, tmp_path):
    (tmp_path / "sibling.py").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file.py").touch()
    (tmp_path / "file.py").write_text(source)
    assert faults(tmp_path / "file.py") != []
    (tmp_path / "file.py").write_text("import os\nfrom .sibling import x\ntry:\n    import triton\nexcept OSError: ...")
    assert faults(tmp_path / "file.py") == []


def test_imports_go_one_way():
    """Rules import no file of the package, fields import the rules, and nothing imports the converter."""
    for name, siblings in (("rules_olmem", []), ("configuration_olmem", ["adapters_olmem", "rules_olmem"])):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        assert imported == siblings
    for path in PACKAGE.glob("*.py"):
        assert "olmem_convert" not in path.read_text()
