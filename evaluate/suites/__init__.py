"""`sailvit suite`: the paper's data sets, run by VLMEvalKit or lmms-eval."""
