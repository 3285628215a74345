"""Behind report.py and `train.py --explain`.

curves.py, transcripts.py, report.html    the page of a run
walk.py, lesson.py                        one question followed through the method, and its words
"""
