"""Getting a Ray cluster: the way into SLURM and what runs inside the job."""
