"""Recurrent layers: chains over time, whose steps share their weights."""
