"""What a user can get wrong, tried on the real command line: is every mistake one clear line, and is nothing left behind?

    pytest tests/bad_input                     # the quick cases, which need no model
    pytest tests/bad_input --whole             # every case, about 12 minutes on two cores
    pytest tests/bad_input --whole -k corpus   # the cases whose name contains a word

The modules words, paths, models, folders, data, corpora, runs and records hold the cases, one table for each subject.
"""
