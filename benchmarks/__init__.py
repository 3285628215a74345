"""Behind eval.py: the seven benchmarks.

- readers.py  each benchmark: where its files are, and what a row asks
- rules.py    finding an answer in a response, and reading it
- sources.py  files and pictures in their published layouts
- asking.py   answers from a model, saved as they come
- scores.py   averages, intervals and comparisons
- mega.py     MEGA-Bench: fields, weights, aggregation;  mega_metrics.py: its metrics
"""
