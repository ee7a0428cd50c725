"""Pieces that several pages show. Each builds escaped HTML in plain functions, tested without a browser."""
