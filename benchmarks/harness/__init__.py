"""What measurements share: engines and servers under test, clients, statistics."""
