"""Trains the reference models, tries them, and draws what was found.

    python benchmarks/reference sweep [--arms "window;selected"] [--steps 500] [--json RATES] [--folder DIR]
    python benchmarks/reference train [--arms "window;selected"] [--seeds 5] [--rates RATES] [--json FILE]
    python benchmarks/reference text [--arms "full;selected"] [--seeds 3] [--json FILE] [--folder DIR] [--smoke]
    python benchmarks/reference distill [--seeds 3] [--json FILE] [--folder DIR] [--smoke]
    python benchmarks/reference stories [--jobs "passkey;qa1"] [--seeds 3] [--seconds 150] [--json FILE] [--folder DIR]
    python benchmarks/reference evaluate FOLDER [--task passkey]
    python benchmarks/reference time FOLDER --task passkey [--most 1048576] [--json FILE]
    python benchmarks/reference draw FILE

`sweep` trains each arm for a while with each of a few learning rates, and writes which of them went farthest. `train`
trains each arm with each seed, some at a time on each GPU, tries each, and writes to the file what is done.
`text` does both with text. `distill` puts a store beside the models of full attention that `text` has left in the
folder, and reads a long stream with them and the others. `stories` trains and tries models that keep a pass key, a
needle or one of bAbI's stories in texts of up to millions of tokens. `evaluate` tries a model that was trained, with
`--task` one of `stories`. `time` reads one such text, and measures bytes of state and time a token on the way. `draw`
makes a plot beside the file. Weights and logs are in the folder.
"""

import argparse
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import story_jobs
import torch
from distill import DISTILL_HELP, DISTILL_SMOKE, DistillSettings, run_distill
from figures import draw
from jobs import HELP, SHAPE, Settings, run, sweep
from olmem import OlmemForCausalLM
from stories import SENTENCES
from story_figures import draw_stories
from story_trials import LENGTHS, time_stream, try_lengths
from text import make_text
from text_figures import draw_distill, draw_text
from text_jobs import TEXT_HELP, TEXT_SMOKE, TextSettings, run_text
from text_trials import read_text
from trials import TIMES, recall


def load_model(folder: Path) -> OlmemForCausalLM:
    model = OlmemForCausalLM.from_pretrained(folder).eval()
    return model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # pyright: ignore[reportArgumentType]


def evaluate(folder: Path, most: int | None, rows: int, task: str | None) -> None:
    model, found = load_model(folder), {}
    if task is not None:
        try_lengths(model, task, 0, rows, most or LENGTHS[0], math.inf, found.update)
    elif model.config.vocab_size == SHAPE.vocabulary:
        found = recall(model, SHAPE, 0, most or TIMES[2], rows, str(model.device))
    else:
        settings = TextSettings()
        text = make_text(settings.characters)
        found = read_text(model, text, model.config.max_position_embeddings, settings.evaluated)
    print(json.dumps(found, indent=2))


def measure_time(folder: Path, task: str, most: int, file: Path | None) -> None:
    found = {"torch": torch.__version__, "task": task} | time_stream(load_model(folder), task, most)
    text = json.dumps(found, indent=1)
    print(text)
    if file is not None:
        file.write_text(text + "\n")


def add_settings(parser: argparse.ArgumentParser, settings: Any, smoke: Any, texts: dict[str, str]) -> None:
    """Adds an option for each field of settings, and where things go."""
    for each in fields(settings):
        usual, little = getattr(settings, each.name), f"; smoke {getattr(smoke, each.name)}" if smoke else ""
        text = f"{texts[each.name]} ({usual}{little})"
        parser.add_argument(f"--{each.name.replace('_', '-')}", type=type(usual), help=text)
    if smoke:
        parser.add_argument("--smoke", action="store_true", help="the same in little, a minute on a CPU")
    parser.add_argument("--folder", type=Path, default=Path("build/reference"), help="for weights and logs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write everything measured")


def draw_file(file: Path) -> None:
    found = json.loads(file.read_text())
    if "table" not in found:
        raise SystemExit(f"{file} must hold a table of `train`, `text`, `distill` or `stories` (it has none)")
    task, table = found.get("task"), found["table"]
    if task == "text":
        content = draw_text(table, found["shape"]["length"])
    elif "jobs" in found["settings"]:
        content = draw_stories(table)
    else:
        content = draw_distill(table) if task == "distill" else draw(table, found["shape"]["length"])
    plot = file.with_suffix(".svg")
    plot.write_bytes(content)
    print(plot)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sweeps = commands.add_parser("sweep", help="finds a learning rate for each arm")
    trains = commands.add_parser("train", help="trains and tries arms")
    texts = commands.add_parser("text", help="trains and tries arms on text")
    distils = commands.add_parser("distill", help="puts a store beside models of full attention, and streams them")
    reads = commands.add_parser("stories", help="trains and tries models that keep a pass key, a needle or a story")
    add_settings(sweeps, Settings(), None, HELP)
    add_settings(trains, Settings(), None, HELP)
    add_settings(texts, TextSettings(), TEXT_SMOKE, TEXT_HELP)
    add_settings(distils, DistillSettings(), DISTILL_SMOKE, DISTILL_HELP)
    add_settings(reads, story_jobs.Settings(), None, story_jobs.HELP)
    trains.add_argument("--rates", type=Path, metavar="FILE", help="what `sweep` wrote")
    tries = commands.add_parser("evaluate", help="tries a model that was trained")
    tries.add_argument("folder", type=Path)
    most = f"times the trained length that are tried ({TIMES[2]}), or tokens with `--task` ({LENGTHS[0]})"
    tries.add_argument("--most", type=int, help=most)
    tries.add_argument("--rows", type=int, default=Settings().rows, help=HELP["rows"])
    tries.add_argument("--task", choices=SENTENCES, help="of `stories`")
    times = commands.add_parser("time", help="measures time and state of a model that was trained by `stories`")
    times.add_argument("folder", type=Path)
    times.add_argument("--task", choices=SENTENCES, required=True, help="of the text")
    times.add_argument("--most", type=int, default=2**20, help="tokens of the text")
    times.add_argument("--json", type=Path, dest="file", metavar="FILE", help="where to write what was measured")
    draws = commands.add_parser("draw", help="draws what a file holds, as an SVG beside it")
    draws.add_argument("file", type=Path)
    given = vars(parser.parse_args(arguments))
    command = given.pop("command")
    if command == "evaluate":
        evaluate(**given)
    elif command == "time":
        measure_time(**given)
    elif command == "draw":
        draw_file(given["file"])
    else:
        begin(command, given)


def begin(command: str, given: dict[str, Any]) -> None:
    """Does what takes settings, and says what comes next."""
    folder, file = given.pop("folder"), given.pop("json")
    is_little = given.pop("smoke", False)

    def choose(usual: Any, smoke: Any = None) -> Any:
        return replace(
            smoke if is_little else usual, **{name: each for name, each in given.items() if each is not None}
        )

    steps = []
    if command == "sweep":
        print(json.dumps(sweep(choose(Settings()), folder, file)))
        steps += [f"train --rates {file}"] if file else []
    elif command == "train":
        rates = given.pop("rates")
        run(choose(Settings()), folder, file, {} if rates is None else json.loads(rates.read_text())["rates"])
        steps += [f"draw {file}"] if file else []
    elif command == "text":
        run_text(choose(TextSettings(), TEXT_SMOKE), folder, file)
        steps += [f"distill --folder {folder} --json FILE"] + ([f"draw {file}"] if file else [])
    elif command == "stories":
        story_jobs.run(choose(story_jobs.Settings()), folder, file)
        steps += [f"draw {file}"] if file else []
    else:
        run_distill(choose(DistillSettings(), DISTILL_SMOKE), folder, file)
        steps += [f"draw {file}"] if file else []
    for step in steps:
        print(f"next: python benchmarks/reference {step}")


if __name__ == "__main__":
    main()
