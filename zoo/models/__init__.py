"""One file per family's network, imported when one is built; the families themselves are in :mod:`zoo.families`.

``index.json`` lists every variant with its costs at its own resolution, so that listing models counts nothing. It is
generated: ``pytest tests/models/test_index.py --update-golden`` rewrites it and the same test keeps it true.
"""
