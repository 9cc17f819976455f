"""Gangs on machines: what an attempt needs, this machine, Ray, and the keeper of each machine."""
