"""The program as a library: functions.py has the functions, results.py what they return (docs/python.md)."""
