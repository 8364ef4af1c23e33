"""API keys of a file: tenants with limits, shares and a place in the order of service."""
