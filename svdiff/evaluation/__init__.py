"""Scores and analyses: `score` and `correlation` hold a stage each."""
