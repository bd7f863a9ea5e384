"""One file a command, which checks what it is told and puts the parts together."""
