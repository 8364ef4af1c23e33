"""Processes for tasks that hostile input may make hang, crash or take all memory: both ends of them, and pools."""
