"""Models as smaller files, and what that costs.

`model` is the whole of it: `writing` reads, quantizes and writes tensor by tensor, in the types that
`mixes` chooses; `gguf_form` says what a model of a Hugging Face directory is in GGUF; `divergence`
measures how far the predictions of what was written are from the source's.
"""
