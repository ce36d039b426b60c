"""`mace feedback import`: preference data of any public format and size into a running server."""
