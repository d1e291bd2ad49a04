"""Engines: what starts, watches and stops a server."""

from varcas.engine.vllm import VllmServer

ENGINES = {"vllm": VllmServer}
"""Name in experiment files (`engine:`) to the class that runs it."""
