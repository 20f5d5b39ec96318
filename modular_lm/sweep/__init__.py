"""Sweeps: which trials there are, what each may spend, and what they say when compared.

Plain functions and files; who starts the trials, and where, is `ray_jobs.sweep`.

- `space`: the variants of a definition, as a pure function of it.
- `trials`: each variant with each seed: its configuration, its cost, its number of steps.
- `folder`: what lies in a sweep's folder.
- `results`: what the trials' run folders hold.
- `statistics`: intervals, paired tests, corrections, bootstrap.
- `summary`: all of it by variant, as JSON; `figures`, `page` and `report` show it.

Imports neither torch, Ray nor MLflow.
"""
