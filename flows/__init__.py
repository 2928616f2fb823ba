"""Prefect flows, MLflow registration and promotion around the `svdiff` stages."""
