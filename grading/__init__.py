"""Behind reward.py: is this text the same answer as that one?

spelling.py: a text in one spelling; choices.py: the options it names; structure.py: lists, relations, words,
and comparing two; units.py: units, times, dates; expression.py: text -> tree; value.py: comparing two trees.
"""
