"""What a run would do with other settings: the run's own scheduling, driven under a simulated clock."""
