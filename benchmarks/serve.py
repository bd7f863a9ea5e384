"""Many conversations on one GPU, each of which waits in a file between its turns.

    python benchmarks/serve.py [--conversations 200] [--turns 2] [--json benchmarks/results/serve.json]
    python benchmarks/serve.py --smoke

One model serves all conversations, a turn of one after a turn of the next. A turn loads the conversation's stream,
reads its next message, writes an answer, and saves the stream. The device's memory must not grow with the number of
conversations. Some of them are also held in memory without a file, and must write the same tokens.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from olmem import OlmemConfig, OlmemForCausalLM
from tqdm import tqdm


@dataclass(frozen=True)
class Settings:
    """Holds the sizes of a run."""

    conversations: int = 200
    turns: int = 2
    checked: int = 4  # conversations that are also held in memory
    message: int = 600  # tokens
    answer: int = 32
    layers: int = 16
    width: int = 2048
    heads: int = 16
    key_heads: int = 8
    intermediate: int = 8192
    vocabulary: int = 100352
    window: int = 1024


SMOKE = Settings(
    conversations=4,
    checked=2,
    message=24,
    answer=4,
    layers=2,
    width=64,
    heads=4,
    key_heads=2,
    intermediate=96,
    vocabulary=97,
    window=32,
)


def make_model(settings: Settings, device: torch.device) -> Any:
    """Returns a model with random weights."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "vocab_size": settings.vocabulary,
        "hidden_size": settings.width,
        "intermediate_size": settings.intermediate,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.key_heads,
        "layer_types": "sliding_attention",
        "sliding_window": settings.window,
        "shared_projections": "key_value",
        "num_sink_tokens": 4,
        "eos_token_id": None,
    }
    with device:
        model: Any = OlmemForCausalLM(OlmemConfig(**config))
    return model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


def message(settings: Settings, conversation: int, turn: int) -> list[int]:
    """Returns the ids of a message."""
    generator = torch.Generator().manual_seed(settings.turns * conversation + turn)
    return torch.randint(settings.vocabulary, (settings.message,), generator=generator).tolist()


def allocated(device: torch.device) -> int:
    """Returns the most bytes of the device that were taken since the last call."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return found


def serve(settings: Settings, folder: Path, device: torch.device) -> dict[str, Any]:
    """Serves all turns of all conversations."""
    model = make_model(settings, device)
    held = {index: model.stream() for index in range(settings.checked)}
    seconds: dict[str, list[float]] = {"load": [], "read": [], "write": [], "save": []}
    peaks, differing, nbytes = [], 0, 0
    options = {"max_new_tokens": settings.answer, "do_sample": False}

    def timed(name: str, start: float) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[name].append(now - start)
        return now

    progress = tqdm(total=settings.turns * settings.conversations, unit="turn", disable=None)
    for turn in range(settings.turns):
        allocated(device)
        for index in range(settings.conversations):
            path, new = folder / f"{index}.safetensors", message(settings, index, turn)
            now = time.perf_counter()
            stream = model.stream(None, path) if turn else model.stream()
            now = timed("load", now)
            stream.read(new)
            now = timed("read", now)
            written = list(stream.write(**options))
            now = timed("write", now)
            stream.save(path)
            timed("save", now)
            nbytes = stream.nbytes
            if index in held:
                held[index].read(new)
                differing += written != list(held[index].write(**options))
            progress.update()
            if (index + 1) % max(settings.conversations // 4, 1) == 0:
                peaks.append(allocated(device))
    progress.close()
    return {
        "bytes of a state": nbytes,
        "bytes of all files": sum(path.stat().st_size for path in folder.iterdir()),
        "peak bytes of the device, by quarter of a round": peaks,
        "held conversations that wrote other tokens": differing,
        "median seconds of a turn": {name: statistics.median(each) for name, each in seconds.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    """Serves, and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help=f"{field.default} by default")
    parser.add_argument("--smoke", action="store_true", help="the same in little, on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write everything measured")
    given = vars(parser.parse_args(arguments))
    smoke, file = given.pop("smoke"), given.pop("json")
    settings = replace(SMOKE if smoke else Settings(), **{k: v for k, v in given.items() if v is not None})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        found = serve(settings, Path(name), device)
    for name, value in found.items():
        print(f"{name:<50}{value}")
    if file is not None:
        machine = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        report = {"device": machine, "torch": torch.__version__, "settings": asdict(settings), "table": found}
        file.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
