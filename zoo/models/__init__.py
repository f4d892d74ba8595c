"""One file per family. This file only says which module holds which family; none is imported until it is asked for.

``index.json`` lists every variant with its costs at its own resolution, so that listing models imports no torch. It is
generated: ``pytest tests/models/test_index.py --update-golden`` rewrites it and the same test keeps it true.
"""

MODULES = {
    "efficientnet": "zoo.models.efficientnet",
    "efficientvit": "zoo.models.efficientvit",
    "tinynet": "zoo.models.tinynet",
}
