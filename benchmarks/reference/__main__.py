"""Trains the reference models, tries them, and draws what was found.

    python benchmarks/reference train [--arms window,selected] [--seeds 5] [--steps 1500] [--json FILE] [--folder DIR]
    python benchmarks/reference evaluate FOLDER
    python benchmarks/reference draw FILE

`train` trains each arm with each seed, some at a time on each GPU, tries each, and writes to the file what is done.
`evaluate` tries a model that was trained. `draw` makes a plot beside the file. Weights and logs are in the folder.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path

import torch
from figures import draw
from jobs import HELP, SHAPE, Settings, run
from olmem import OlmemForCausalLM
from trials import TIMES, recall


def evaluate(folder: Path, most: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = OlmemForCausalLM.from_pretrained(folder).to(device)  # pyright: ignore[reportArgumentType]
    print(json.dumps(recall(model, SHAPE, 0, most, device), indent=2))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    trains = commands.add_parser("train", help="trains and tries arms")
    for each in fields(Settings):
        name, text = f"--{each.name.replace('_', '-')}", f"{HELP[each.name]} ({each.default})"
        trains.add_argument(name, type=type(each.default), default=each.default, help=text)
    trains.add_argument("--folder", type=Path, default=Path("build/reference"), help="for weights and logs")
    trains.add_argument("--json", type=Path, metavar="FILE", help="where to write everything measured")
    tries = commands.add_parser("evaluate", help="tries a model that was trained")
    tries.add_argument("folder", type=Path)
    tries.add_argument("--most", type=int, default=TIMES[-1], help=HELP["most"])
    draws = commands.add_parser("draw", help="draws what a file holds, as an SVG beside it")
    draws.add_argument("file", type=Path)
    given = vars(parser.parse_args(arguments))
    command = given.pop("command")
    if command == "train":
        folder, file = given.pop("folder"), given.pop("json")
        run(Settings(**given), folder, file)
        if file is not None:
            print(f"next: python benchmarks/reference draw {file}")
    elif command == "evaluate":
        evaluate(**given)
    else:
        file: Path = given["file"]
        plot = file.with_suffix(".svg")
        plot.write_bytes(draw(json.loads(file.read_text())["table"], SHAPE.length))
        print(plot)


if __name__ == "__main__":
    main()
