"""Autoscaler: scales the stages of a deployment on Kubernetes by the work that Redis knows of.

policy      what should be, out of what is seen: no IO
observe     what is seen, out of the pipeline's state
cluster     Kubernetes: how many there are, how many there should be, and which go first
leader      one of several autoscalers acts
scaler      the loop around these
"""
