"""Training text: pairs of prompt and response, plain documents, and the filter in front of both.

Nothing here imports torch or knows a tokenizer: what comes out is text with an id and a source.
"""
