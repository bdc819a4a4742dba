"""What every command needs and no model: files, records, messages, errors, signals, and how processes are launched."""
