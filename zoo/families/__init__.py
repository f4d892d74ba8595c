"""One file per family: its config, its :class:`~zoo.registry.Family` and its variants, all of it numbers and no torch.

This file only says which module holds which family; none is imported until it is asked for. A family's network is in
:mod:`zoo.models`, and loads when one is built.
"""

MODULES = {
    "anynet": "zoo.families.anynet",
    "efficientformer": "zoo.families.efficientformer",
    "efficientformer_v2": "zoo.families.efficientformer_v2",
    "efficientmod": "zoo.families.efficientmod",
    "efficientnet": "zoo.families.efficientnet",
    "efficientvit": "zoo.families.efficientvit",
    "efficientvmamba": "zoo.families.efficientvmamba",
    "lowformer": "zoo.families.lowformer",
    "matmulfree": "zoo.families.matmulfree",
    "mixture_of_recursions": "zoo.families.mixture_of_recursions",
    "regnet": "zoo.families.regnet",
    "tinynet": "zoo.families.tinynet",
}
