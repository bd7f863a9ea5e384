"""Loads a model as a user would and prints the checksum of its logits. Run as a file, with tasks on standard input.

It imports nothing of this package, for what is installed would take the place of the code that a repository holds; so
tasks of such code come first. It is run without token and network: what it loads is on the disk, and was compared with
what was to be published.
"""

import hashlib
import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Prints, a line for each task, what came of it."""
    for task in json.load(sys.stdin):
        print(json.dumps(run(task)))


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Loads the model that the task names, and has it read the prompt."""
    if task["installed"]:
        import olmem  # noqa: F401  registers the classes that load it
    options: dict[str, Any] = {"local_files_only": True}
    if task["revision"]:
        options["revision"] = task["revision"]
    if task["offload"]:
        options |= {"device_map": "auto", "offload_folder": task["offload"]}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        task["model"],
        trust_remote_code=not task["installed"],
        dtype=getattr(torch, task["dtype"]),
        attn_implementation="sdpa",
        output_loading_info=True,
        **options,
    )
    model, info = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        sys.exit(f"weights are missing or unexpected: {wrong}")
    with torch.no_grad():
        logits = model.eval()(torch.tensor(task["input_ids"]), use_cache=False).logits.cpu().contiguous()
    digest = hashlib.sha256(f"{logits.dtype} {tuple(logits.shape)}".encode())
    digest.update(logits.view(torch.uint8).numpy().data)
    finite = bool(logits.isfinite().all())
    return {"logits": digest.hexdigest(), "finite": finite, "module": type(model).__module__}


if __name__ == "__main__":
    main()
