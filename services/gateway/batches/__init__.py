"""Files and batches: requests that a client leaves in a file, which run when nobody else waits."""
