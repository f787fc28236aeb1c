"""Sweeps: arms and seeds from one file, trained one after the other, compared in pairs."""
