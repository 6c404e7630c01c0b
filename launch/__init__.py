"""Start jobs on this machine, through Slurm or on Kubernetes; the entry is `python -m launch`."""
