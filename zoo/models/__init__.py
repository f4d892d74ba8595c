"""One file per family. This file only says which module holds which family; none is imported until it is asked for.

``index.json`` lists every variant with its costs at its own resolution, so that listing models imports no torch. It is
generated: ``pytest tests/models/test_index.py --update-golden`` rewrites it and the same test keeps it true.
"""

MODULES = {
    "anynet": "zoo.models.anynet",
    "efficientformer": "zoo.models.efficientformer",
    "efficientformer_v2": "zoo.models.efficientformer_v2",
    "efficientmod": "zoo.models.efficientmod",
    "efficientnet": "zoo.models.efficientnet",
    "efficientvit": "zoo.models.efficientvit",
    "efficientvmamba": "zoo.models.efficientvmamba",
    "lowformer": "zoo.models.lowformer",
    "matmulfree": "zoo.models.matmulfree",
    "mixture_of_recursions": "zoo.models.mixture_of_recursions",
    "regnet": "zoo.models.regnet",
    "tinynet": "zoo.models.tinynet",
}
