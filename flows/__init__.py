"""The workflow around the library: Prefect runs DVC's stages, MLflow has the registered concepts; no telemetry, no proxy on this machine."""

import os

# The one place where telemetry is switched off: nothing that this project starts may try the network by itself.
# Children (stages, server, worker, engine) inherit the environment; a user's own values win.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}.items():
    os.environ.setdefault(_name, _value)

# Servers on this machine are asked directly, whatever proxy is set for others.
_direct = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(
    dict.fromkeys([*filter(None, _direct), "127.0.0.1", "localhost", "::1"])
)
