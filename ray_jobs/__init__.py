"""Jobs on Ray: each module is an entry point, `python -m ray_jobs.<name> key=value ...`.

Orchestration only: what can be a plain function lives in `modular_lm`.
"""
