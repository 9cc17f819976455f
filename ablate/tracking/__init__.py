"""What watches a study from outside; an outage of it stops nothing."""
