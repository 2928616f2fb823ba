"""Prefect: the flows, the task around a stage, what the server does by itself, what its UI shows."""
