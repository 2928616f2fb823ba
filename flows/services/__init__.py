"""The processes of the workflow: Prefect server, worker, MLflow UI, started and stopped by one command."""
