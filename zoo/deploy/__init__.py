"""Shipping a model: the fastest form that still answers the same, and files for other runtimes.

program.py     a model as a program: torch.export, ONNX
engines.py     what runs programs: inductor, onnxruntime, OpenVINO, each behind one small interface
forms.py       ways of running the module itself: as it is, fused, channels-last, CUDA graphs
optimize.py    zoo.optimize: try, check, measure, choose, explain
single.py      one engine without a search
worker.py      the process in which a candidate is built and checked
artefact.py    zoo.load_optimized: what is saved, and when it may be used again
folder.py      the folder of either, which takes no other's place
export.py      zoo.export: one file, run again in its own runtime
"""
