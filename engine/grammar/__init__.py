"""Structured output: a form compiled to a grammar, and what it allows next, token by token, by llguidance.

llguidance is optional: it is imported when the first request asks for a form.
"""
