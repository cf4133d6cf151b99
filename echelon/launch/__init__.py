"""Where the roles of a run are started: on this machine, on a Ray cluster, in a Slurm job."""
