"""Trains the reference models, tries them, and draws what was found.

    python benchmarks/reference sweep [--arms "window;selected"] [--steps 500] [--json RATES] [--folder DIR]
    python benchmarks/reference train [--arms "window;selected"] [--seeds 5] [--rates RATES] [--json FILE]
    python benchmarks/reference evaluate FOLDER
    python benchmarks/reference draw FILE

`sweep` trains each arm for a while with each of a few learning rates, and writes which of them went farthest. `train`
trains each arm with each seed, some at a time on each GPU, tries each, and writes to the file what is done.
`evaluate` tries a model that was trained. `draw` makes a plot beside the file. Weights and logs are in the folder.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path

import torch
from figures import draw
from jobs import HELP, SHAPE, Settings, run, sweep
from olmem import OlmemForCausalLM
from trials import TIMES, recall


def evaluate(folder: Path, most: int, rows: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = OlmemForCausalLM.from_pretrained(folder).to(device)  # pyright: ignore[reportArgumentType]
    print(json.dumps(recall(model, SHAPE, 0, most, rows, device), indent=2))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sweeps = commands.add_parser("sweep", help="finds a learning rate for each arm")
    trains = commands.add_parser("train", help="trains and tries arms")
    for command in (sweeps, trains):
        for each in fields(Settings):
            name, text = f"--{each.name.replace('_', '-')}", f"{HELP[each.name]} ({each.default})"
            command.add_argument(name, type=type(each.default), default=each.default, help=text)
        command.add_argument("--folder", type=Path, default=Path("build/reference"), help="for weights and logs")
        command.add_argument("--json", type=Path, metavar="FILE", help="where to write everything measured")
    trains.add_argument("--rates", type=Path, metavar="FILE", help="what `sweep` wrote")
    tries = commands.add_parser("evaluate", help="tries a model that was trained")
    tries.add_argument("folder", type=Path)
    tries.add_argument("--most", type=int, default=TIMES[-1], help=HELP["most"])
    tries.add_argument("--rows", type=int, default=Settings().rows, help=HELP["rows"])
    draws = commands.add_parser("draw", help="draws what a file holds, as an SVG beside it")
    draws.add_argument("file", type=Path)
    given = vars(parser.parse_args(arguments))
    command = given.pop("command")
    if command in ("sweep", "train"):
        folder, file, rates = given.pop("folder"), given.pop("json"), given.pop("rates", None)
        settings = Settings(**given)
        if command == "sweep":
            print(json.dumps(sweep(settings, folder, file)))
            if file is not None:
                print(f"next: python benchmarks/reference train --rates {file}")
        else:
            run(settings, folder, file, {} if rates is None else json.loads(rates.read_text())["rates"])
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
