"""Tells a model a pass key, reads 100,000 tokens to it, and asks for the key: `python remember.py FOLDER`."""

import random
import sys

import torch
from olmem import OlmemForCausalLM
from olmem_convert.metrics.recall_tasks import REPEATED
from transformers import AutoTokenizer

TOKENS = 100_000


def main(folder: str) -> None:
    torch.set_num_threads(1)  # with more a model as small as this is slower
    model, tokenizer = OlmemForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    key, filler = random.randrange(10_000, 100_000), "".join(REPEATED)
    stream = model.stream(tokenizer)
    stream.read(f" The pass key is {key}. Remember it. {key} is the pass key.")
    before = stream.nbytes
    stream.read(filler * (TOKENS // len(tokenizer(filler).input_ids)))
    print(f"A stream was told the pass key {key}, and has read {TOKENS:,} tokens since, through windows of ", end="")
    print(f"{model.config.sliding_window}. Its state took {before:,} bytes before, and takes {stream.nbytes:,} now.")
    stream.read(" What is the pass key? The pass key is")
    print(f"Told {key}, it answers{''.join(stream.write(max_new_tokens=5))}.")


if __name__ == "__main__":
    main(*sys.argv[1:])
