"""Coordinates: rounds, fleets, the run folder, reports, the command line."""
