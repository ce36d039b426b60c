"""The feedback store: tables, what is asked of them, and what comes in."""
