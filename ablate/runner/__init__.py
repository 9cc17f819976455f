"""A study turned into attempts: plan, look before, the loop, status."""
