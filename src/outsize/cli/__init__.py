"""Thin commands over the public package; one file per command."""
