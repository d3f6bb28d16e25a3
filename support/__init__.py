"""What checks, guards and reports a run. You need nothing in here to understand federated learning.

start.py         Can the program begin?
text.py          Texts in one line.
tables.py        A table in a terminal.
arguments.py     Is the command line right?
flag_types.py    Is a single flag right?
run.py           What guards a run: one run a workspace, earlier results kept, one line for whatever fails.
process.py       This process, its signals, and the processes that a run starts.
recipe.py        What a recipe needs beside NVFlare's defaults: modules to send, guards on server and sites.
environments.py  NVFlare's SimEnv, PocEnv and ProdEnv, with what they need.
simulation.py    The simulator, which ends when a site's process dies.
console.py       What a job's processes show.
failure.py       Which site failed, and why: it reads NVFlare's logs.
results.py       What NVFlare left, read once, checked once.
summary.py       What is shown: the table at the start, the summary at the end; and summary.json.
federation/      For --env poc and prod alone.
on_server/       Travels with the job to the server.
on_site/         Travels with the job to the sites, and starts the client script there.
"""
