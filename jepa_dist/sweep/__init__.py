"""Sweeps: one list of arms and seeds, checked, run member by member, and read in pairs."""
