"""What surrounds a run. You need nothing in here to understand federated learning.

arguments.py     Is the command line right?
places.py        Can these files and folders be used?
run.py           What holds before, during and after a run? One run a workspace, nothing left running.
folder.py        Whose is a run's folder? Nothing is lost.
failure.py       Which site failed, and why?
console.py       What do a simulation's processes print, and what if it can't be written?
progress.py      What of that, and of NVFlare's logs, is shown?
follow.py        How does a job get on in a federation?
server.py        What does the server do beside FedAvg? It travels with the job.
presence.py      How does a job do without a site that it lost? It travels, too.
environments.py  Where does it run? What NVFlare's SimEnv, PocEnv and ProdEnv need to run well.
results.py       What did NVFlare leave?
samples.py       What does each site train and test on?
summary.py       How is it shown?
"""
