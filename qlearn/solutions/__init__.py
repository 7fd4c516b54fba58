"""Worked solutions of the book's exercises, one module a chapter, all of them tested.

For exercise k of chapter NN the module chNN holds `solution_k`, what the book shows folded away,
and `check_k(answer)`, which raises AssertionError with a hint where the answer is wrong.
"""
