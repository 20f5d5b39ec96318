"""modular-lm: train, sweep and evaluate modular language models.

The library is plain PyTorch: importing it needs neither Ray nor MLflow. Orchestration lives in
`ray_jobs`, cluster start-up in `cluster`.
"""

__version__ = "0.1.0"
