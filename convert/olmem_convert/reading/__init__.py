"""Bytes that somebody else made: everything of a checkpoint or of a converted folder is read here."""
