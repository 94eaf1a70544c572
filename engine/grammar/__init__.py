"""Structured output: a form compiled to a grammar, and what it allows next, token by token, by llguidance.

llguidance is optional: nothing here is imported before a request asks for a form.
"""
