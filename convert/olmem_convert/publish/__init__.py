"""The model card, what of a folder may be published, and its way to the Hub."""
