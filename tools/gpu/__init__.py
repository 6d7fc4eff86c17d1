"""What a machine with one GPU can tell in ten minutes: `python -m tools.gpu`."""
