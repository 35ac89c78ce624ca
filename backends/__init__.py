"""Backends: one module an engine."""
