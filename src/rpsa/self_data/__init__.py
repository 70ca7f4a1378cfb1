"""Safety data in the model's own words: it answers, a filter chooses (ThinkSafe, arXiv 2601.23143).

Data that other models or people have written pull a model away from its own distribution, and reasoning with it. Here
the model itself refuses harmful requests, steered by an instruction that is not in the training data, and complies
with harmless ones. `offers` has what is asked and what is accepted, `making` does it, `stored` reads what is left,
`order` is the command `rpsa safety-data`.
"""
