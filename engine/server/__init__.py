"""The HTTP server: the engine behind the interface that OpenAI's and vLLM's clients speak.

Needs the extra `serve`, and is imported by the commands `serve` and `batch` alone; but for `limits.py`, whose
settings are flags. Nothing else of the engine knows HTTP.
"""
