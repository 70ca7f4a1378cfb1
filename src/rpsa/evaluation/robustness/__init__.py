"""Robustness: the same evaluation of a model under attack, by the prompt or on its weights.

`jailbreaks` change how a model is asked, `tampering`, `direction` and `weights` what it is; `exchange` has the files of
other tools; `attacks` says which attacks a recipe's section `robustness` comes to, and makes the attacked model.
"""
