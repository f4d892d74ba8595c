"""One data pipeline: source -> decode -> transform -> batch -> device, each stage a small typed part.

Everything random is a function of (seed, epoch, sample), so the order and the augmentation of samples do not depend on
the number of workers, and a resumed run continues with the very next sample.
"""
