"""Loads a converted folder as anybody would, and lets it write Python: `python generate.py FOLDER [PROMPT]`."""

import sys

import olmem  # noqa: F401  registers the Auto classes; without it, trust_remote_code=True uses the folder's own code
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

PROMPT = '''class Stack:
    """A last-in, first-out container."""

    def __init__(self):
        self._items = []

    def push(self, item):
'''


def main(folder: str, prompt: str = PROMPT) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    # Longer than the model's window of 256 tokens, so that the cache lets go of what has left it.
    print(generate(prompt, max_new_tokens=300, do_sample=False, repetition_penalty=1.1)[0]["generated_text"])


if __name__ == "__main__":
    main(*sys.argv[1:])
