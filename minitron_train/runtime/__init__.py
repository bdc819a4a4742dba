"""Process-level code that knows no model: files, records, messages, errors, signals, launching of processes."""
