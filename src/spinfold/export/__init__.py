"""Checkpoints that other runtimes load, and the proof that they do."""
