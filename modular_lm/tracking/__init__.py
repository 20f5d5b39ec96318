"""What a run leaves behind, and who reads it.

The files in a run's folder are the truth (`run_folder`). MLflow (`mlflow_projection`) and the
terminal (`console`) follow them from threads of the driver's side (`follower`); nothing that trains
calls either. `snapshot` copies the code that ran.
"""

from modular_lm.tracking.console import ConsoleProgress
from modular_lm.tracking.follower import Follower, replay
from modular_lm.tracking.mlflow_projection import MlflowProjection, tracking_uri
from modular_lm.tracking.run_folder import JsonLines, RunFolder
from modular_lm.tracking.snapshot import snapshot_code

__all__ = [
    "ConsoleProgress",
    "Follower",
    "JsonLines",
    "MlflowProjection",
    "RunFolder",
    "replay",
    "snapshot_code",
    "tracking_uri",
]
