"""Centralised runs: the same run folder, reports and scores as a federation's, without one."""
