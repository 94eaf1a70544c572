"""The HTTP server: the engine behind the interface that OpenAI's and vLLM's clients speak.

Needs the extra `serve`, and is imported by the command `serve` alone. Nothing else of the engine knows HTTP.
"""
