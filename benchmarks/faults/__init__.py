"""Nothing lost: faults of every kind while jobs and generations run on real parts, then a count of what is left."""
