"""A rollout worker's engine as a service over HTTP: `echelon serve`."""
