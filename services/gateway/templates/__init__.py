"""Rendering of chat templates, in processes of their own."""
