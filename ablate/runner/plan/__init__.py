"""What a study will run, cost and be able to show, before it runs."""
