"""Behind reward.py: is this text the same answer as that one?

- spelling.py    a text in one spelling: LaTeX wrappers, blanks, signs
- choices.py     which options a text names, by letter or by text
- structure.py   its outermost structure: a list, an interval, a relation, words; and comparing two
- units.py       numbers with units, times and dates
- expression.py  the grammar of expressions: text -> tree
- value.py       are two trees the same value?
"""
