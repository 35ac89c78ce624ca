"""The 19 tasks, one module each."""
