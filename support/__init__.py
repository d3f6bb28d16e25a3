"""What surrounds a run. You need nothing in here to understand federated learning.

arguments.py     Is the command line right?
run.py           What holds before, during and after a run? One run a workspace, nothing lost, nothing left running.
failure.py       Which site failed, and why?
environments.py  Where does it run? What NVFlare's SimEnv, PocEnv and ProdEnv need to run well.
results.py       What did NVFlare leave?
summary.py       How is it shown?
"""
