"""Blocks at rest and in motion: where each plane is, and what moves, updates and commits it."""
