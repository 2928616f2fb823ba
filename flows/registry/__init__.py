"""MLflow: storing and registering versions, promotion and manual overrides, the model that serves a concept."""
