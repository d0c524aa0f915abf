"""Flower: its messages, its grids, its apps. Nothing outside this folder imports Flower or Ray."""
