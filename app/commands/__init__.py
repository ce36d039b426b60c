"""One module for each command of `mace`."""
