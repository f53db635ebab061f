"""
Evaluation of vision encoders.

`run_probe` compares encoders by the accuracy of small heads on their frozen features: the paper's recognition protocol.
"""
