"""Traces: what requests came when, with which prompts; read from files, made up, described."""
