"""A model loaded in a process of its own, away from the user's caches, without token and network.

So is verified what no other checkpoint can tell of: that the folder's own code loads the folder's weights, and computes
what the installed olmem does, bit for bit.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import olmem
import psutil
import torch
import transformers
from huggingface_hub import get_token

from ..errors import CheckpointError
from ..options import Say
from ..proof.loading import nonfinite_weights
from ..proof.prompts import SEED, draw_prompt, length_of
from ..proof.report import seal_of, write_report
from ..reading.olmem_folder import identities, require_unchanged, stored_dtype
from .release import check_contents, check_kind

OF_THE_USER = {  # variables of places and rules that a process with an empty cache must not know
    *("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE", "TRANSFORMERS_CACHE"),
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH", "HF_OIDC_RESOURCE"),
}
MOST_OF_MEMORY = 0.8  # of which weights may take this much before they are offloaded


def verify_reload(out: Path, say: Say, allow_nonfinite: bool = False) -> dict[str, Any]:
    """Verifies of the folder `out` what needs no other checkpoint, and writes verification.json of kind `reload`.

    The folder holds what a model on the Hub is made of, and the code in it is that of the installed olmem, byte for
    byte; its weights are those of the config, and finite; and by its own code it computes the same logits, bit for bit.
    """
    before = identities(out)
    for path in sorted(out.iterdir()):
        check_kind(path)
    config, stored = check_contents(out), stored_dtype(out)
    nonfinite = nonfinite_weights(out, allow_nonfinite)
    prompt = {"tokens": length_of(config), "vocabulary": config.vocab_size, "seed": SEED}
    say("loading the folder by its own code and by the installed olmem, in a process without token and network")
    with tempfile.TemporaryDirectory(prefix="olmem-") as scratch:
        tasks = [task_of(str(out.resolve()), out, prompt, installed, scratch, say) for installed in (False, True)]
        found = run_tasks(tasks, scratch, get_token())
    for task, loaded in zip(tasks, found, strict=True):
        check_loaded(loaded, task["installed"], finite=not nonfinite)
    if found[0]["logits"] != found[1]["logits"]:
        raise CheckpointError(
            "the logits that the folder's own code computes must be those of the installed olmem, bit for bit (they "
            "are not); verify it again on an idle machine: of the same code it is a fault of this one."
        )
    require_unchanged(before, "it is verified")
    report = {
        "passed": True,
        "kind": "reload",
        "prompt": prompt,
        "dtype": str(stored).removeprefix("torch."),
        "nonfinite": nonfinite,
        "sha256": seal_of(out),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "olmem": olmem.__version__},
    }
    write_report(out, report, "installed")
    say(
        f"verified: the folder's own code computes the logits of the installed olmem, bit for bit ({prompt['tokens']} "
        f"tokens, computed in {report['dtype']}); it was not compared with another checkpoint"
    )
    return report


def task_of(
    model: str,
    folder: Path,
    prompt: Mapping[str, int],
    installed: bool,
    scratch: str,
    say: Say,
    revision: str | None = None,
) -> dict[str, Any]:
    """What reload.py is told: to load `model`, which has the files of `folder`, and to read the prompt."""
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    offload = weights > MOST_OF_MEMORY * psutil.virtual_memory().total
    if offload and installed:
        say("the model is larger than the free memory, so layers are read from the disk when they are needed")
    return {
        "model": model,
        "installed": installed,
        "revision": revision,
        "dtype": str(stored_dtype(folder)).removeprefix("torch."),
        "input_ids": draw_prompt(prompt["tokens"], prompt["vocabulary"], prompt["seed"]).tolist(),
        "offload": scratch if offload else None,
    }


def run_tasks(tasks: Sequence[Mapping[str, Any]], scratch: str, token: str | None) -> list[dict[str, Any]]:
    """Runs reload.py away from the user's caches, without the token and without the network.

    Tasks of a folder's own code come first, as what is installed would take its place.
    """
    environment = {
        name: value for name, value in os.environ.items() if name not in OF_THE_USER and not (token and token in value)
    } | {
        "HF_HOME": scratch,
        "HF_MODULES_CACHE": f"{scratch}/modules",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-P", str(Path(__file__).with_name("reload.py"))]
    done = subprocess.run(command, input=json.dumps(tasks), env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return [json.loads(line) for line in done.stdout.splitlines()[-len(tasks) :]]
    why = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    why = why.replace(token, "hf_…") if token else why
    raise CheckpointError(
        f"the model must load and run (a new process ended with {why!r}); convert it again, or save it with the "
        "installed olmem."
    )


def check_loaded(report: Mapping[str, Any], installed: bool, finite: bool) -> None:
    """Raises CheckpointError unless the code that was to be tried has computed logits, which are numbers."""
    if not report["module"].startswith("olmem." if installed else "transformers_modules."):
        raise CheckpointError(f"the code that loads the model is another than was to be tried ({report['module']})")
    if finite and not report["finite"]:
        raise CheckpointError(
            "the logits of the prompt in verification.json must be numbers (some are none), as the weights are; run it "
            "in a wider dtype: what overflows is not published."
        )
