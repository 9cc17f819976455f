"""Pictures of results and of runs."""
