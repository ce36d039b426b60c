"""`mace chaos`: kill processes of a server under load and count what is lost."""
