"""The face of MACE: the Serve application builder, the command line, HTTP routes and wire schemas."""
