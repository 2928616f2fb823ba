"""Scores, analyses and the report: `score`, `correlation`, `rank`, `report` hold a stage each."""
