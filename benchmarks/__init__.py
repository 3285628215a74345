"""Behind eval.py: the seven benchmarks. Start with readers.py, what a row asks, and rules.py."""
