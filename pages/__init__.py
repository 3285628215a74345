"""Behind report.py, the page of a run, and `train.py --explain`, the walk and its words."""
