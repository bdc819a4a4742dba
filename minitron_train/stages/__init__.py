"""Stages: a folder each, written whole or not at all, with a provenance.json that says how it came about."""
