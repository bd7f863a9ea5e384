"""A folder that appears whole or not at all: its weights, its tokenizer, and the renames that make it OUT."""
