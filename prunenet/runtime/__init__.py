"""Devices, processes and files: what every room stands on.

placement.py  where the weights of a model are: one device, several (accelerate's device map), or
the disk parallel.py   collectives over the processes of one job (torch.distributed); the identity
on one process team.py       joins the processes of a job and notices when one dies files.py
folders and files that appear complete or not at all; the cache folder
"""
