"""Loads a converted folder as anybody would, which then writes, and reads a long file: `python generate.py FOLDER`."""

import argparse
import sys
from pathlib import Path

from olmem import OlmemForCausalLM  # which registers it; without it, trust_remote_code=True uses the folder's own code
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

PROMPT = '''class Stack:
    """A last-in, first-out container."""

    def __init__(self):
        self._items = []

    def push(self, item):
'''
FUNCTION = "\n\ndef parse_arguments(parser):\n"


def main(folder: str, prompt: str = PROMPT) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    # Longer than the model's window of 256 tokens, so that the cache lets go of what has left it.
    print(generate(prompt, max_new_tokens=300, do_sample=False, repetition_penalty=1.1)[0]["generated_text"])

    # The same weights with a window and 4 sinks in every layer read a text of any length in constant memory.
    model = OlmemForCausalLM.from_pretrained(folder, layer_types="sliding_attention", num_sink_tokens=4)
    stream = model.stream(tokenizer)
    stream.read(prompt)
    before, file = stream.nbytes, Path(argparse.__file__)
    stream.read(file.read_text())
    print(
        f"\nA stream has read {file.name}, which is many windows long. Its state took {before:,} bytes before, ", end=""
    )
    print(f"and takes {stream.nbytes:,} now. It goes on:\n")
    stream.read(FUNCTION)
    print(FUNCTION.lstrip(), *stream.write(max_new_tokens=60, do_sample=False, repetition_penalty=1.1), sep="")


if __name__ == "__main__":
    main(*sys.argv[1:])
